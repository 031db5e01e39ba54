// Silu(x) * y in one pass over memory on the CPU, with PyTorch's own threads. The exponential is written out,
// since a call of the library's would keep the compiler from vectorizing the loop.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "cpu.h"
#include "silu.h"

namespace l2p {
namespace {

constexpr int64_t kGrain = 32768;  // elements worth a thread

L2P_INLINE double exponential(double x) { return std::exp(x); }

// e^x = 2^n * e^r with |r| <= ln(2) / 2, and a polynomial for e^r (Cephes' expf): within 2 units in the last place.
L2P_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves n in the lowest bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return e * power;
}

template <typename A>
L2P_INLINE A sigmoid(A x) { return 1 / (1 + exponential(-x)); }

template <typename T>
L2P_INLINE void forward(const SiluData& d, int64_t begin, int64_t end) {
  const T* __restrict x = static_cast<const T*>(d.x);
  const T* __restrict y = static_cast<const T*>(d.y);
  T* __restrict out = static_cast<T*>(d.out);
  for (int64_t i = begin; i < end; ++i) {
    const auto value = load(x[i]);
    store(out[i], silu_mul_value(value, load(y[i]), sigmoid(value)));
  }
}

template <typename T>
L2P_INLINE void backward(const SiluData& d, int64_t begin, int64_t end) {
  const T* __restrict x = static_cast<const T*>(d.x);
  const T* __restrict y = static_cast<const T*>(d.y);
  const T* __restrict grad = static_cast<const T*>(d.grad);
  T* __restrict x_grad = static_cast<T*>(d.x_grad);
  T* __restrict y_grad = static_cast<T*>(d.y_grad);
  for (int64_t i = begin; i < end; ++i) {
    const auto value = load(x[i]);
    const auto grads = silu_mul_grads(load(grad[i]), value, load(y[i]), sigmoid(value));
    store(x_grad[i], grads.x);
    store(y_grad[i], grads.y);
  }
}

void forward_any(const SiluData& d, Element element, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA {
    with_type(element, [&](auto type) L2P_INLINE_LAMBDA { forward<decltype(type)>(d, begin, end); });
  });
}

void backward_any(const SiluData& d, Element element, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA {
    with_type(element, [&](auto type) L2P_INLINE_LAMBDA { backward<decltype(type)>(d, begin, end); });
  });
}

}  // namespace

void silu_mul_cpu(const SiluData& d, Element element) {
  prefer_huge_pages(d.out, d.count * element_bytes(element));
  torch::stable::parallel_for(0, d.count, kGrain,
                              [&](int64_t begin, int64_t end) { forward_any(d, element, begin, end); });
}

void silu_mul_backward_cpu(const SiluData& d, Element element) {
  prefer_huge_pages(d.x_grad, d.count * element_bytes(element));
  prefer_huge_pages(d.y_grad, d.count * element_bytes(element));
  torch::stable::parallel_for(0, d.count, kGrain,
                              [&](int64_t begin, int64_t end) { backward_any(d, element, begin, end); });
}

}  // namespace l2p
