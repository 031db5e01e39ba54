// Comes before each of the ops' C++ faces, which are otherwise as they are. What they register for CUDA is registered
// for the CPU, in place of the CPU's kernels, and no device is chosen.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#define L2P_REGISTER_CPU(space, m) [[maybe_unused]] static void not_registered(torch::stable::detail::StableLibrary& m)
#define L2P_REGISTER_CUDA(space, m) _STABLE_TORCH_LIBRARY_IMPL(space, CPU, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(space, key, m) L2P_REGISTER_##key(space, m)

namespace torch::stable::accelerator {
struct NoDevice {
  explicit NoDevice(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoDevice
