// What the .cu files need of CUDA, for a CPU's compiler. Kernels, launches and shared memory are C++ here:
// a kernel is a function, `__shared__` is thread_local (so all shared memory is one segment of the library, which the
// emulator finds, fills and watches), threadIdx and its like are variables that the scheduler sets. ../emulator.cpp runs
// a block's threads as fibers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

using Place = std::source_location;
constexpr int kWarp = 32;

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

void sync_block(const Place&);

// Gives `bytes` (64 at most) to the other lanes of the warp and waits for all of `mask` to come with the same `what`.
// Lane l's bytes are then at result + 64 * l, until this lane's next exchange.
const char* exchange(const char* what, unsigned mask, const void* mine, size_t bytes);
template <typename T>
T of_lane(const char* given, unsigned lane) {
  T value;
  std::memcpy(&value, given + 64 * lane, sizeof value);
  return value;
}

cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t run(const void* kernel, const cudaLaunchConfig_t&, size_t parameter_bytes, void (*body)(void*), void* context);

}  // namespace emulator

template <typename... Wanted>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Wanted...), cudaFuncAttribute, int bytes) {
  return emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

// A GPU so small that blocks which stay must each do several blocks' work.
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
template <typename... Wanted>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Wanted...), int, size_t) {
  return *blocks = 2, cudaSuccess;
}

template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), const Given&... given) {
  auto call = [&] { kernel(given...); };
  return emulator::run(
      reinterpret_cast<const void*>(kernel), *config, (0 + ... + sizeof(Wanted)),
      [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

inline void __syncthreads(emulator::Place place = emulator::Place::current()) { emulator::sync_block(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange("__syncwarp", mask, nullptr, 0); }

// The lane that `source` gives for this one, within a part of `width` lanes; beyond the part its own.
template <typename T, typename Source>
T emulator_shuffle(const char* what, unsigned mask, T value, int width, const Source& source) {
  const char* given = emulator::exchange(what, mask, &value, sizeof value);
  const int mine = static_cast<int>(emulator::lane()), part = mine / width * width;
  const int from = source(mine - part);
  return emulator::of_lane<T>(given, from >= 0 && from < width ? part + from : mine);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = emulator::kWarp) {
  return emulator_shuffle("__shfl_xor_sync", mask, value, width, [&](int lane) { return lane ^ with; });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = emulator::kWarp) {
  return emulator_shuffle("__shfl_sync", mask, value, width, [&](int) { return from % width; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = emulator::kWarp) {
  return emulator_shuffle("__shfl_down_sync", mask, value, width, [&](int lane) { return lane + static_cast<int>(by); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = emulator::kWarp) {
  return emulator_shuffle("__shfl_up_sync", mask, value, width, [&](int lane) { return lane - static_cast<int>(by); });
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const char* given = emulator::exchange("__ballot_sync", mask, &vote, sizeof vote);
  unsigned votes = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) {
    if ((mask >> lane & 1) && emulator::of_lane<int>(given, lane)) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(x)); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) {
  const float size = std::fabs(y);
  return size > 0x1p126f && size < INFINITY ? 0.0f * x : x / y;  // what the manual says of large divisors
}

// What csrc/ptx.cuh has for nvcc, after the PTX manual's tables.
namespace l2p {

void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// ldmatrix.x4: four 8 x 8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8.
void load_matrices(uint32_t (&to)[4], const void* row);

// cp.async: 16 bytes to shared memory, `count` of them copied, the rest zero. They arrive as late as the waits allow.
void copy_async(void* to, const void* from, int count = 16);
void commit_copies();
void wait_copies(int groups_left);

inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) {
  const float result = 1 / x;
  return std::fabs(result) < 0x1p-126f ? std::copysign(0.0f, x) : result;
}

}  // namespace l2p
