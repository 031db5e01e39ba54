// Why: what every CUDA kernel shares: element types, their conversions, 16-byte vectors.
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

// Calls body(T{}) with the element type.
template <typename Body>
void with_type(Element element, const Body& body) {
  switch (element) {
    case Element::f32: return body(float{});
    case Element::f64: return body(double{});
    case Element::f16: return body(__half{});
    case Element::bf16: return body(__nv_bfloat16{});
  }
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace l2p
