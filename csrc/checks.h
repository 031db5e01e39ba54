// What every op's C++ face needs from PyTorch's stable ABI: element types, the current CUDA stream, launch errors.
// Kernels never include this file: they see pointers, strides and a stream, and build without PyTorch's headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "element.h"

// Weak: a CPU build of PyTorch lacks this symbol, and the same extension must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace l2p {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    case ScalarType::Half: return Element::f16;
    case ScalarType::BFloat16: return Element::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, what, " must be float32, float64, float16 or bfloat16");
  return Element::f32;  // not reached
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline void check_device(const Tensor& x, const Tensor& other, const char* what) {
  STD_TORCH_CHECK(other.is_cpu() == x.is_cpu() && other.get_device_index() == x.get_device_index(), what,
                  " must be on the device of x");
}

inline void check_like(const Tensor& x, const Tensor& other, const char* what) {
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), what, " must have the dtype of x");
  check_device(x, other, what);
}

inline void check_shape(const Tensor& x, const Tensor& other, const char* what) {
  STD_TORCH_CHECK(other.dim() == x.dim(), what, " must have the shape of x");
  for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(other.size(i) == x.size(i), what, " must have the shape of x");
}

inline void* current_cuda_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this build of PyTorch has no CUDA, yet a CUDA kernel of l2p_fast was called");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0, "no current CUDA stream");
  return stream;
}

// error: what a launcher returned; null when the launch went well.
inline void check_launch(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, kernel, ": CUDA launch failed: ", error == nullptr ? "" : error);
}

}  // namespace l2p
