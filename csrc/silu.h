// The gate of the feed-forward, silu(x) * y, and its gradients, each value written once for the CPU and CUDA.
#pragma once

#include <cstdint>

#include "element.h"

namespace l2p {

template <typename A>
struct SiluGrads {
  A x, y;
};

// sigmoid: of x.
template <typename A>
L2P_HOST_DEVICE inline A silu_mul_value(A x, A y, A sigmoid) { return x * sigmoid * y; }

template <typename A>
L2P_HOST_DEVICE inline SiluGrads<A> silu_mul_grads(A grad, A x, A y, A sigmoid) {
  return {grad * y * sigmoid * (1 + x * (1 - sigmoid)), grad * x * sigmoid};
}

// All dense, of `count` elements. The backward has `grad`, `x_grad` and `y_grad`, the forward `out`.
struct SiluData {
  const void *x, *y, *grad;
  void *out, *x_grad, *y_grad;
  int64_t count;
};

void silu_mul_cpu(const SiluData&, Element);
void silu_mul_backward_cpu(const SiluData&, Element);

// These launch on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* silu_mul_cuda(const SiluData&, Element, void* stream);
const char* silu_mul_backward_cuda(const SiluData&, Element, void* stream);

}  // namespace l2p
