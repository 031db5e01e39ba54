// Bias, SiLU and pool in one pass: a thread takes 8 channels (or one, of maps with odd counts) of one pixel or, where it
// pools, of four.
#include "activate.h"

#include "activation.cuh"
#include "cuda.cuh"
#include "index.h"

namespace l2p {
namespace {

constexpr int kThreads = 256;

// Of pixel (y, x), whose values begin at `at`.
template <int N>
__device__ Vector<__nv_bfloat16, N> activated(const ActivateData& d, int64_t y, int64_t x, int64_t channel, int64_t at) {
  using Values = Vector<__nv_bfloat16, N>;
  const Values values = *reinterpret_cast<const Values*>(static_cast<const __nv_bfloat16*>(d.x) + at);
  Values others{};
  if (d.other != nullptr) others = *reinterpret_cast<const Values*>(static_cast<const __nv_bfloat16*>(d.other) + at);
  const int row = y == 0 ? 0 : y == d.height - 1 ? 2 : 1, column = x == 0 ? 0 : x == d.width - 1 ? 2 : 1;
  const float* bias = d.bias + (d.kinds == 1 ? 0 : 3 * row + column) * d.channels + channel;
  Values out;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float sum = to_float(values.values[i]) + __ldg(bias + i);
    if (d.other != nullptr) sum += to_float(others.values[i]);
    out.values[i] = convert<__nv_bfloat16>(fast_silu(sum));
  }
  return out;
}

template <int N>
__device__ void put(void* to, int64_t at, const Vector<__nv_bfloat16, N>& vector) {
  __nv_bfloat16* place = static_cast<__nv_bfloat16*>(to) + at;
  if constexpr (N == 8) {
    store(place, vector);
  } else {
    *place = vector.values[0];
  }
}

template <int N, bool pool>
__global__ void __launch_bounds__(kThreads) activate_kernel(ActivateData d, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  constexpr int kSide = pool ? 2 : 1;
  const Divided channels = divided(index, d.channels / N), columns = divided(channels.quotient, d.width / kSide);
  const Divided rows = divided(columns.quotient, d.height / kSide);
  const int64_t channel = channels.remainder * N;
  Vector<__nv_bfloat16, N> largest;
#pragma unroll
  for (int i = 0; i < kSide * kSide; ++i) {
    const int64_t y = rows.remainder * kSide + i / 2, x = columns.remainder * kSide + i % 2;
    const int64_t at = ((rows.quotient * d.height + y) * d.width + x) * d.channels + channel;
    const Vector<__nv_bfloat16, N> out = activated<N>(d, y, x, channel, at);
    if (d.out != nullptr) put<N>(d.out, at, out);
#pragma unroll
    for (int k = 0; k < N; ++k) largest.values[k] = i == 0 ? out.values[k] : __hmax_nan(largest.values[k], out.values[k]);
  }
  if (pool) put<N>(d.pooled, index * N, largest);
}

template <int N>
const char* launch_activate(const ActivateData& d, void* stream) {
  const int64_t values = d.batch * d.height * d.width * d.channels / N, count = d.pooled != nullptr ? values / 4 : values;
  if (const char* problem = too_many(count)) return problem;
  const auto kernel = d.pooled != nullptr ? activate_kernel<N, true> : activate_kernel<N, false>;
  return launch(kernel, blocks_for(count, kThreads), kThreads, 0, stream, d, count);
}

}  // namespace

const char* activate_cuda(const ActivateData& d, void* stream) {
  const bool whole = d.channels % 8 == 0 && is_aligned(d.x) && (d.other == nullptr || is_aligned(d.other));
  return whole ? launch_activate<8>(d, stream) : launch_activate<1>(d, stream);
}

}  // namespace l2p
