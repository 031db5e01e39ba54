// What every CUDA kernel shares: element types, their conversions, 16-byte vectors, shared memory, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "element.h"

namespace l2p {

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T values[N];
};

// One store of 16 bytes: a plain assignment is taken apart by the compiler now and then.
template <typename T, int N>
__device__ void store(T* to, const Vector<T, N>& vector) {
  static_assert(sizeof vector == sizeof(uint4));
  uint4 bits;
  memcpy(&bits, &vector, sizeof bits);
  __stwb(reinterpret_cast<uint4*>(to), bits);
}

// What values of a type are computed in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Named conversions: PyTorch's build flags take the implicit ones away.
__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(double value) { return static_cast<float>(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename To, typename From>
__device__ inline To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(to_float(value));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(to_float(value));
  } else {
    return to_float(value);
  }
}

// body(T{}) with the element type.
template <typename Body>
auto with_type(Element element, const Body& body) {
  switch (element) {
    case Element::f32: return body(float{});
    case Element::f64: return body(double{});
    case Element::f16: return body(__half{});
    default: return body(__nv_bfloat16{});
  }
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The block's dynamic shared memory.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
}

constexpr int64_t kSharedBytes = 96 * 1024;  // of dynamic shared memory, on every architecture from sm_80 on

// More than 48 KB, static shared memory included, must be asked for: always as much, so that threads can't lower each
// other's limit. Where the device has less than is needed, the launch says so.
template <typename... Wanted>
cudaError_t allow_shared(void (*kernel)(Wanted...), int64_t shared) {
  if (shared <= 47 * 1024) return cudaSuccess;
  const int64_t bytes = shared < kSharedBytes ? kSharedBytes : shared;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Null, or what went wrong.
inline const char* told(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here: not again by whoever asks next
  return cudaGetErrorString(error);
}

// How many blocks the current device holds at once. Null, or what went wrong.
template <typename... Wanted>
const char* resident_blocks(void (*kernel)(Wanted...), int threads, int64_t shared, int64_t& count) {
  int device = 0, processors = 0, each = 0;
  cudaError_t error = allow_shared(kernel, shared);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared));
  }
  count = static_cast<int64_t>(processors) * each;
  return told(error);
}

// Launches on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
template <typename... Wanted, typename... Given>
const char* launch(void (*kernel)(Wanted...), dim3 grid, dim3 block, int64_t shared, void* stream,
                   const Given&... given) {
  cudaError_t error = allow_shared(kernel, shared);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(given)...);
  }
  return told(error);
}

// Blocks of `threads` that have one thread for each of `count`.
inline unsigned blocks_for(int64_t count, int threads) {
  return static_cast<unsigned>((count + threads - 1) / threads);
}

}  // namespace l2p
