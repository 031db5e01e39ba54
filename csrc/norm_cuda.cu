// The norm steps in one pass over memory on CUDA, forward and backward. The index arithmetic is norm.h's, which
// the CPU tests check. Block norms: a block of threads takes a slab of rows, each thread the same columns of every row;
// what a group's rows are multiplied by is put together once in shared memory, the backward's sums gather there too,
// each slot touched by one thread alone. Query and key norms: some lanes of a warp take a row, which is short. A row is
// read twice, the second time from the cache. Sums of slabs are added up by a second kernel in a fixed order: no
// atomics.
#include <cuda_fp8.h>

#include "cuda.cuh"
#include "norm.h"

namespace l2p {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kBytes = 16;  // results of 8 bits that are stored at once
constexpr unsigned kAll = 0xffffffffu;

// N consecutive elements at once where they are aligned, else one by one.
template <typename T, int N, bool kWide>
struct Chunk {
  Accumulator<T> values[N];

  __device__ explicit Chunk(const T* from) {
    if constexpr (kWide) {
      const Vector<T, N> vector = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
      for (int e = 0; e < N; ++e) values[e] = convert<Accumulator<T>>(vector.values[e]);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) values[e] = convert<Accumulator<T>>(from[e]);
    }
  }

  __device__ static void put(T* to, const Accumulator<T> (&values)[N]) {
    if constexpr (kWide) {
      Vector<T, N> vector;
#pragma unroll
      for (int e = 0; e < N; ++e) vector.values[e] = convert<T>(values[e]);
      store(to, vector);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = convert<T>(values[e]);
    }
  }
};

__device__ float inverse_root(float value) { return 1.0f / sqrtf(value); }
__device__ double inverse_root(double value) { return 1.0 / sqrt(value); }
__device__ float tanh_of(float value) { return tanhf(value); }
__device__ double tanh_of(double value) { return tanh(value); }

template <typename A>
__device__ A modulate(Modulation kind, A value) {
  return kind == Modulation::scale ? 1 + value : kind == Modulation::gate ? tanh_of(value) : A{1};
}

template <typename A>
struct Pair {
  A first, second;
};

// How the second of a pair is joined with others; the first is added up.
struct Add {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Largest {
  template <typename A>
  __device__ A operator()(A a, A b) const {
    return larger(a, b);
  }
};

template <int kLanes, typename Second = Add, typename A>
__device__ Pair<A> lanes_sum(Pair<A> value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value.first += __shfl_xor_sync(kAll, value.first, offset);
    value.second = Second{}(value.second, __shfl_xor_sync(kAll, value.second, offset));
  }
  return value;
}

// Every thread gets the block's sums. `parity` alternates between calls, so that one barrier is enough.
template <typename Second = Add, typename A>
__device__ Pair<A> block_sum(Pair<A> value, int parity) {
  __shared__ Pair<A> warps[2][kWarp];
  value = lanes_sum<kWarp, Second>(value);
  if (threadIdx.x % kWarp == 0) warps[parity][threadIdx.x / kWarp] = value;
  __syncthreads();
  Pair<A> sum{0, 0};
  for (int w = 0; w < static_cast<int>(blockDim.x / kWarp); ++w) {
    sum.first += warps[parity][w].first;
    sum.second = Second{}(sum.second, warps[parity][w].second);
  }
  return sum;
}

// A thread's slots in shared memory for element e of its chunk at column j: neighbours' slots lie side by side.
__device__ int slot(int64_t j, int chunk, int e, int64_t width) {
  return static_cast<int>(e * (width / chunk) + j / chunk);
}

template <typename T, int N, bool kWide, typename A>
__device__ void fill_factor(const NormShape& s, const NormData& d, int64_t group, A* factor) {
  const T* weight = static_cast<const T*>(d.weight);
  const T* given = static_cast<const T*>(d.modulation) + group * s.modulation_stride;
  for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
    const Chunk<T, N, kWide> w(weight + j), m(given + j);
#pragma unroll
    for (int e = 0; e < N; ++e) factor[slot(j, N, e, s.width)] = w.values[e] * modulate<A>(s.modulation, m.values[e]);
  }
}

template <typename T, int N, bool kWide>
__global__ void __launch_bounds__(kThreads) forward_kernel(NormShape s, NormData d) {
  using A = Accumulator<T>;
  A* factor = dynamic_shared<A>();
  const Slab slab = slab_at(s, blockIdx.x);
  fill_factor<T, N, kWide>(s, d, slab.group, factor);
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    const T* x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    T* out = static_cast<T*>(d.out) + row * s.width;
    Pair<A> sum{0, 0};
    for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
      const Chunk<T, N, kWide> value(x + j);
#pragma unroll
      for (int e = 0; e < N; ++e) sum.first += value.values[e] * value.values[e];
    }
    sum = block_sum(sum, row & 1);
    const A r = inverse_root(sum.first / s.width + static_cast<A>(s.eps));
    for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
      const Chunk<T, N, kWide> value(x + j);
      A result[N];
#pragma unroll
      for (int e = 0; e < N; ++e) result[e] = value.values[e] * r * factor[slot(j, N, e, s.width)];
      if (d.residual != nullptr) {
        const Chunk<T, N, kWide> base(static_cast<const T*>(d.residual) + row_offset(s, s.residual_stride, row) + j);
#pragma unroll
        for (int e = 0; e < N; ++e) result[e] += base.values[e];
      }
      Chunk<T, N, kWide>::put(out + j, result);
    }
  }
}

__device__ uint8_t to_byte(float value, Rounding rounding) {
  if (rounding == Rounding::int8) return static_cast<uint8_t>(__float2int_rn(value));
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

// As forward_kernel, in 8 bits: the largest result is the largest |x * factor|, normed.
template <typename T, int N, bool kWide>
__global__ void __launch_bounds__(kThreads) rounded_kernel(NormShape s, NormData d) {
  using A = Accumulator<T>;
  A* factor = dynamic_shared<A>();
  const Slab slab = slab_at(s, blockIdx.x);
  fill_factor<T, N, kWide>(s, d, slab.group, factor);
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    const T* x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    uint8_t* out = static_cast<uint8_t*>(d.out) + row * s.width;
    Pair<A> sum{0, 0};  // x^2, and the largest
    for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
      const Chunk<T, N, kWide> value(x + j);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A product = value.values[e] * factor[slot(j, N, e, s.width)];
        sum.first += value.values[e] * value.values[e];
        sum.second = larger(product < 0 ? -product : product, sum.second);
      }
    }
    sum = block_sum<Largest>(sum, row & 1);
    const A r = inverse_root(sum.first / s.width + static_cast<A>(s.eps));
    const float scale = scale_of(static_cast<float>(r * sum.second), s.rounding);
    const A by = r / scale;
    if (threadIdx.x == 0) d.row_scale[row] = scale;
    for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
      const Chunk<T, N, kWide> value(x + j);
      Vector<uint8_t, N> bytes;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A result = value.values[e] * factor[slot(j, N, e, s.width)] * by;
        bytes.values[e] = to_byte(static_cast<float>(result), s.rounding);
      }
      if constexpr (kWide) {
        store(out + j, bytes);
      } else {
        out[j] = bytes.values[0];
      }
    }
  }
}

template <typename T, int N, bool kWide>
__global__ void __launch_bounds__(kThreads) backward_kernel(NormShape s, NormData d) {
  using A = Accumulator<T>;
  A* factor = dynamic_shared<A>();
  A* sums = factor + s.width;
  const Slab slab = slab_at(s, blockIdx.x);
  fill_factor<T, N, kWide>(s, d, slab.group, factor);
  for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
#pragma unroll
    for (int e = 0; e < N; ++e) sums[slot(j, N, e, s.width)] = 0;
  }
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    const T* x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    const T* grad = static_cast<const T*>(d.grad) + row * s.width;
    T* x_grad = static_cast<T*>(d.x_grad) + row * s.width;
    Pair<A> sum{0, 0};  // x^2, and the gradient of the normed row along x
    for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
      const Chunk<T, N, kWide> value(x + j), g(grad + j);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        sum.first += value.values[e] * value.values[e];
        sum.second += g.values[e] * factor[slot(j, N, e, s.width)] * value.values[e];
      }
    }
    sum = block_sum(sum, row & 1);
    const A r = inverse_root(sum.first / s.width + static_cast<A>(s.eps));
    const A along = r * r * sum.second / s.width;
    for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
      const Chunk<T, N, kWide> value(x + j), g(grad + j);
      A result[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int at = slot(j, N, e, s.width);
        result[e] = r * (g.values[e] * factor[at] - value.values[e] * along);
        sums[at] += g.values[e] * (value.values[e] * r);
      }
      Chunk<T, N, kWide>::put(x_grad + j, result);
    }
  }
  A* out = static_cast<A*>(d.sums) + blockIdx.x * s.width;
  for (int64_t j = threadIdx.x * N; j < s.width; j += blockDim.x * N) {
#pragma unroll
    for (int e = 0; e < N; ++e) out[j + e] = sums[slot(j, N, e, s.width)];
  }
}

// Rows of heads: kLanes lanes take a row each, the lanes of a block the rows of a slab in turn.
template <typename T, int N, bool kWide, int kLanes>
__global__ void __launch_bounds__(kThreads) rope_forward_kernel(NormShape s, NormData d) {
  using A = Accumulator<T>;
  const Slab slab = slab_at(s, blockIdx.x);
  const int lane = threadIdx.x % kLanes;
  // All lanes of a warp go through the loop alike, since they exchange sums; those beyond the end store nothing.
  for (int64_t first = slab.begin; first < slab.end; first += kThreads / kLanes) {
    const int64_t mine = first + threadIdx.x / kLanes, row = mine < slab.end ? mine : slab.end - 1;
    const T* x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    Pair<A> sum{0, 0};
    for (int64_t j = lane * N; j < s.width; j += kLanes * N) {
      const Chunk<T, N, kWide> value(x + j);
#pragma unroll
      for (int e = 0; e < N; ++e) sum.first += value.values[e] * value.values[e];
    }
    const A r = inverse_root(lanes_sum<kLanes>(sum).first / s.width + static_cast<A>(s.eps));
    if (mine >= slab.end) continue;
    const float* cos = d.cos + angle_offset(s, row);
    const float* sin = d.sin + angle_offset(s, row);
    for (int64_t j = lane * N; j < s.width; j += kLanes * N) {
      const Chunk<T, N, kWide> value(x + j), weight(static_cast<const T*>(d.weight) + j);
      const Chunk<float, N / 2, kWide> c(cos + j / 2), n(sin + j / 2);
      A result[N];
#pragma unroll
      for (int e = 0; e < N; e += 2) {
        const A a = value.values[e] * r * weight.values[e], b = value.values[e + 1] * r * weight.values[e + 1];
        result[e] = a * c.values[e / 2] - b * n.values[e / 2];
        result[e + 1] = a * n.values[e / 2] + b * c.values[e / 2];
      }
      Chunk<T, N, kWide>::put(static_cast<T*>(d.out) + row * s.width + j, result);
    }
  }
}

// The gradient turned back by the row's angles.
template <typename T, int N, bool kWide>
__device__ void turn_back(const NormShape& s, const NormData& d, int64_t row, int64_t j, Accumulator<T> (&turned)[N]) {
  const Chunk<T, N, kWide> grad(static_cast<const T*>(d.grad) + row * s.width + j);
  const Chunk<float, N / 2, kWide> c(d.cos + angle_offset(s, row) + j / 2), n(d.sin + angle_offset(s, row) + j / 2);
#pragma unroll
  for (int e = 0; e < N; e += 2) {
    turned[e] = grad.values[e] * c.values[e / 2] + grad.values[e + 1] * n.values[e / 2];
    turned[e + 1] = grad.values[e + 1] * c.values[e / 2] - grad.values[e] * n.values[e / 2];
  }
}

template <typename T, int N, bool kWide, int kLanes>
__global__ void __launch_bounds__(kThreads) rope_backward_kernel(NormShape s, NormData d) {
  using A = Accumulator<T>;
  constexpr int kRows = kThreads / kLanes;
  A* sums = dynamic_shared<A>();  // (kRows, E)
  const Slab slab = slab_at(s, blockIdx.x);
  const int lane = threadIdx.x % kLanes;
  A* own = sums + threadIdx.x / kLanes * s.width;
  for (int64_t j = lane * N; j < s.width; j += kLanes * N) {
#pragma unroll
    for (int e = 0; e < N; ++e) own[slot(j, N, e, s.width)] = 0;
  }
  for (int64_t first = slab.begin; first < slab.end; first += kRows) {
    const int64_t mine = first + threadIdx.x / kLanes, row = mine < slab.end ? mine : slab.end - 1;
    const T* x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    A turned[N];
    Pair<A> sum{0, 0};
    for (int64_t j = lane * N; j < s.width; j += kLanes * N) {
      const Chunk<T, N, kWide> value(x + j), weight(static_cast<const T*>(d.weight) + j);
      turn_back<T, N, kWide>(s, d, row, j, turned);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        sum.first += value.values[e] * value.values[e];
        sum.second += turned[e] * weight.values[e] * value.values[e];
      }
    }
    sum = lanes_sum<kLanes>(sum);
    if (mine >= slab.end) continue;
    const A r = inverse_root(sum.first / s.width + static_cast<A>(s.eps));
    const A along = r * r * sum.second / s.width;
    for (int64_t j = lane * N; j < s.width; j += kLanes * N) {
      const Chunk<T, N, kWide> value(x + j), weight(static_cast<const T*>(d.weight) + j);
      turn_back<T, N, kWide>(s, d, row, j, turned);
      A result[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        result[e] = r * (turned[e] * weight.values[e] - value.values[e] * along);
        own[slot(j, N, e, s.width)] += turned[e] * (value.values[e] * r);
      }
      Chunk<T, N, kWide>::put(static_cast<T*>(d.x_grad) + row * s.width + j, result);
    }
  }
  __syncthreads();
  A* out = static_cast<A*>(d.sums) + blockIdx.x * s.width;
  for (int64_t j = threadIdx.x; j < s.width; j += kThreads) {
    const int at = slot(j, N, static_cast<int>(j % N), s.width);
    A sum = 0;
    for (int k = 0; k < kRows; ++k) sum += sums[k * s.width + at];
    out[j] = sum;
  }
}

// Slabs' sums to the gradients of weight and modulation: a block of 32 x 32 threads takes 32 columns.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarp) finish_kernel(NormShape s, NormData d) {
  using A = Accumulator<T>;
  __shared__ A part[kWarp][kWarp + 1];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t slabs = slabs_of_group(s);
  const bool live = j < s.width;
  A whole = 0;
  for (int64_t group = 0; group < s.groups; ++group) {
    const A* sums = static_cast<const A*>(d.sums) + group * slabs * s.width + j;
    A sum = 0;
    if (live) {
#pragma unroll 4
      for (int64_t k = threadIdx.y; k < slabs; k += kWarp) sum += sums[k * s.width];
    }
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && live) {
      sum = 0;
      for (int k = 0; k < kWarp; ++k) sum += part[k][threadIdx.x];
      if (s.modulation == Modulation::none) {
        whole += sum;
      } else {
        const T given = static_cast<const T*>(d.modulation)[group * s.modulation_stride + j];
        const A by = modulate<A>(s.modulation, convert<A>(given));
        const A slope = s.modulation == Modulation::gate ? 1 - by * by : A{1};
        whole += sum * by;
        const A weight = convert<A>(static_cast<const T*>(d.weight)[j]);
        static_cast<T*>(d.modulation_grad)[group * s.width + j] = convert<T>(sum * weight * slope);
      }
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && live) static_cast<T*>(d.weight_grad)[j] = convert<T>(whole);
}

unsigned slab_count(const NormShape& s) { return static_cast<unsigned>(s.groups * slabs_of_group(s)); }

// Threads of a block that has the columns of a row, `chunk` at once, shared out evenly.
int threads_for(int64_t width, int chunk) {
  const int64_t chunks = (width + chunk - 1) / chunk, rounds = (chunks + kThreads - 1) / kThreads;
  const int64_t threads = (chunks + rounds - 1) / rounds;
  return static_cast<int>((threads + kWarp - 1) / kWarp * kWarp);
}

bool rows_are_aligned(const NormShape& s, const int64_t stride[3], const void* data, int bytes) {
  return is_aligned(data) && stride[0] * bytes % 16 == 0 && stride[1] * bytes % 16 == 0 && stride[2] * bytes % 16 == 0;
}

// Every chunk of every operand is a whole 16 bytes; of the angles, half as many values of 4 bytes.
bool chunks_are_aligned(const NormShape& s, const NormData& d, int bytes) {
  const int64_t angle_bytes = 16 / bytes / 2 * 4;
  const bool angles = d.cos == nullptr || (reinterpret_cast<uintptr_t>(d.cos) % angle_bytes == 0 &&
                                           reinterpret_cast<uintptr_t>(d.sin) % angle_bytes == 0 &&
                                           s.angle_stride[0] * 4 % angle_bytes == 0 &&
                                           s.angle_stride[1] * 4 % angle_bytes == 0);
  return angles && s.width * bytes % 16 == 0 && is_aligned(d.weight) && is_aligned(d.modulation) &&
         s.modulation_stride * bytes % 16 == 0 && rows_are_aligned(s, s.x_stride, d.x, bytes) &&
         rows_are_aligned(s, s.residual_stride, d.residual, bytes) && is_aligned(d.grad);
}

template <typename T, int N, bool kWide>
const char* forward_block(const NormShape& s, const NormData& d, void* stream) {
  const int64_t shared = s.width * static_cast<int64_t>(sizeof(Accumulator<T>));
  return launch(forward_kernel<T, N, kWide>, slab_count(s), threads_for(s.width, N), shared, stream, s, d);
}

template <typename T, int N, bool kWide>
const char* rounded_block(const NormShape& s, const NormData& d, void* stream) {
  const int64_t shared = s.width * static_cast<int64_t>(sizeof(Accumulator<T>));
  return launch(rounded_kernel<T, N, kWide>, slab_count(s), threads_for(s.width, N), shared, stream, s, d);
}

template <typename T, int N, bool kWide>
const char* backward_block(const NormShape& s, const NormData& d, void* stream) {
  const int64_t shared = 2 * s.width * static_cast<int64_t>(sizeof(Accumulator<T>));
  return launch(backward_kernel<T, N, kWide>, slab_count(s), threads_for(s.width, N), shared, stream, s, d);
}

template <typename T, int N, bool kWide, int kLanes>
const char* rope(const NormShape& s, const NormData& d, void* stream) {
  if (d.grad == nullptr) {
    return launch(rope_forward_kernel<T, N, kWide, kLanes>, slab_count(s), kThreads, 0, stream, s, d);
  }
  const int64_t shared = kThreads / kLanes * s.width * static_cast<int64_t>(sizeof(Accumulator<T>));
  return launch(rope_backward_kernel<T, N, kWide, kLanes>, slab_count(s), kThreads, shared, stream, s, d);
}

// As many lanes as a row has chunks: heads of 128 bfloat16 values take half a warp.
template <typename T, int N>
const char* rope_by_width(const NormShape& s, const NormData& d, void* stream) {
  if (s.width <= 8 * N) return rope<T, N, true, 8>(s, d, stream);
  if (s.width <= 16 * N) return rope<T, N, true, 16>(s, d, stream);
  return rope<T, N, true, kWarp>(s, d, stream);
}

}  // namespace

const char* norm_forward_cuda(const NormShape& s, const NormData& d, Element element, void* stream) {
  if (const char* problem = too_many(row_count(s))) return problem;
  return with_type(element, [&](auto type) {
    using T = decltype(type);
    constexpr int kWidest = 16 / sizeof(T);
    const bool wide = chunks_are_aligned(s, d, sizeof(T));
    if (d.cos != nullptr) {
      return wide ? rope_by_width<T, kWidest>(s, d, stream) : rope<T, 2, false, kWarp>(s, d, stream);
    }
    if (s.rounding != Rounding::none) {
      return wide && s.width % kBytes == 0 ? rounded_block<T, kBytes, true>(s, d, stream)
                                           : rounded_block<T, 1, false>(s, d, stream);
    }
    return wide ? forward_block<T, kWidest, true>(s, d, stream) : forward_block<T, 1, false>(s, d, stream);
  });
}

const char* norm_backward_cuda(const NormShape& s, const NormData& d, Element element, void* stream) {
  if (const char* problem = too_many(row_count(s))) return problem;
  return with_type(element, [&](auto type) {
    using T = decltype(type);
    constexpr int kWidest = 16 / sizeof(T);
    const bool wide = chunks_are_aligned(s, d, sizeof(T));
    const char* error =
        d.cos != nullptr
            ? wide ? rope_by_width<T, kWidest>(s, d, stream) : rope<T, 2, false, kWarp>(s, d, stream)
            : wide ? backward_block<T, kWidest, true>(s, d, stream) : backward_block<T, 1, false>(s, d, stream);
    if (error != nullptr) return error;
    return launch(finish_kernel<T>, blocks_for(s.width, kWarp), dim3(kWarp, kWarp), 0, stream, s, d);
  });
}

}  // namespace l2p
