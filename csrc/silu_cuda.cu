// Silu(x) * y in one pass over memory on CUDA, 16 bytes of each operand a thread. Operands are dense: PyTorch's
// allocations are aligned, and a view that is not goes element by element, as does the end.
#include "cuda.cuh"
#include "silu.h"

namespace l2p {
namespace {

constexpr int kThreads = 256;

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

template <typename T>
__device__ void forward_one(T x, T y, T& out) {
  using A = Accumulator<T>;
  const A value = convert<A>(x);
  out = convert<T>(silu_mul_value(value, convert<A>(y), sigmoid(value)));
}

template <typename T>
__device__ void backward_one(T grad, T x, T y, T& x_grad, T& y_grad) {
  using A = Accumulator<T>;
  const A value = convert<A>(x);
  const SiluGrads<A> grads = silu_mul_grads(convert<A>(grad), value, convert<A>(y), sigmoid(value));
  x_grad = convert<T>(grads.x);
  y_grad = convert<T>(grads.y);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(SiluData d, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < chunks) {
    using V = Vector<T, N>;
    const V x = static_cast<const V*>(d.x)[index], y = static_cast<const V*>(d.y)[index];
    V out;
#pragma unroll
    for (int e = 0; e < N; ++e) forward_one(x.values[e], y.values[e], out.values[e]);
    static_cast<V*>(d.out)[index] = out;
  } else if (const int64_t i = chunks * N + index - chunks; i < d.count) {
    forward_one(static_cast<const T*>(d.x)[i], static_cast<const T*>(d.y)[i], static_cast<T*>(d.out)[i]);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(SiluData d, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < chunks) {
    using V = Vector<T, N>;
    const V grad = static_cast<const V*>(d.grad)[index];
    const V x = static_cast<const V*>(d.x)[index], y = static_cast<const V*>(d.y)[index];
    V x_grad, y_grad;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      backward_one(grad.values[e], x.values[e], y.values[e], x_grad.values[e], y_grad.values[e]);
    }
    static_cast<V*>(d.x_grad)[index] = x_grad;
    static_cast<V*>(d.y_grad)[index] = y_grad;
  } else if (const int64_t i = chunks * N + index - chunks; i < d.count) {
    backward_one(static_cast<const T*>(d.grad)[i], static_cast<const T*>(d.x)[i], static_cast<const T*>(d.y)[i],
                 static_cast<T*>(d.x_grad)[i], static_cast<T*>(d.y_grad)[i]);
  }
}

// Threads 0 to chunks - 1 take a chunk each, those after them an element each of what is left.
template <int N>
int64_t chunk_count(const SiluData& d) {
  const bool aligned = is_aligned(d.x) && is_aligned(d.y) && is_aligned(d.grad);  // results are fresh: aligned
  return aligned ? d.count / N : 0;
}

template <int N>
unsigned block_count(const SiluData& d) {
  const int64_t chunks = chunk_count<N>(d);
  return blocks_for(chunks + (d.count - chunks * N), kThreads);
}

}  // namespace

const char* silu_mul_cuda(const SiluData& d, Element element, void* stream) {
  return with_type(element, [&](auto type) {
    using T = decltype(type);
    constexpr int kChunk = 16 / sizeof(T);
    return launch(forward_kernel<T, kChunk>, block_count<kChunk>(d), kThreads, 0, stream, d, chunk_count<kChunk>(d));
  });
}

const char* silu_mul_backward_cuda(const SiluData& d, Element element, void* stream) {
  return with_type(element, [&](auto type) {
    using T = decltype(type);
    constexpr int kChunk = 16 / sizeof(T);
    return launch(backward_kernel<T, kChunk>, block_count<kChunk>(d), kThreads, 0, stream, d, chunk_count<kChunk>(d));
  });
}

}  // namespace l2p
