// The norm steps in one pass over memory on the CPU, forward and backward, with PyTorch's own threads. What the
// rows of a group or the heads of a token share (weight, scale, gate, angles) is put together once, in a buffer that
// stays in the cache.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu.h"
#include "norm.h"

namespace l2p {
namespace {

constexpr int kLanes = 32;  // independent sums, so that the compiler may add vectors

// The sum of term(j) over j < n; the order does not depend on the processor.
template <typename A, typename Term>
L2P_INLINE A sum_over(int64_t n, const Term& term) {
  A lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(j + k);
  }
  for (; j < n; ++j) lanes[j % kLanes] += term(j);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <typename A>
L2P_INLINE A modulate(Modulation kind, A value) {
  return kind == Modulation::scale ? 1 + value : kind == Modulation::gate ? std::tanh(value) : A{1};
}

// What a group's rows are multiplied by, once normed: weight * (1 + scale), weight * tanh(gate) or the weight.
template <typename T, typename A>
L2P_INLINE void fill_factor(const NormShape& s, const NormData& d, int64_t group, A* factor) {
  const T* weight = static_cast<const T*>(d.weight);
  const T* given = static_cast<const T*>(d.modulation) + group * s.modulation_stride;
  for (int64_t j = 0; j < s.width; ++j) {
    factor[j] = load(weight[j]);
    if (s.modulation != Modulation::none) factor[j] *= modulate<A>(s.modulation, load(given[j]));
  }
}

template <typename T>
L2P_INLINE void forward_slab(const NormShape& s, const NormData& d, int64_t index) {
  using A = Accumulator<T>;
  const Slab slab = slab_at(s, index);
  std::vector<A> buffer(s.width);
  A* __restrict factor = buffer.data();
  fill_factor<T>(s, d, slab.group, factor);
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    const T* __restrict x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    T* __restrict out = static_cast<T*>(d.out) + row * s.width;
    const A squares = sum_over<A>(s.width, [&](int64_t j) L2P_INLINE_LAMBDA { return load(x[j]) * load(x[j]); });
    const A r = 1 / std::sqrt(squares / s.width + static_cast<A>(s.eps));
    if (d.residual != nullptr) {
      const T* __restrict residual = static_cast<const T*>(d.residual) + row_offset(s, s.residual_stride, row);
      for (int64_t j = 0; j < s.width; ++j) store(out[j], load(residual[j]) + load(x[j]) * r * factor[j]);
    } else {
      for (int64_t j = 0; j < s.width; ++j) store(out[j], load(x[j]) * r * factor[j]);
    }
  }
}

// Of at most a little above 127, to nearest, ties to even.
L2P_INLINE uint8_t to_int8(float value) {
  const float shifted = value + 0x1.8p23f;  // beyond 2^23 a float has no fraction
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return static_cast<uint8_t>(bits);
}

// e4m3 without infinities, to nearest, ties to even; beyond 448 the largest, NaN stays. Sums in place of choices, which
// the compiler would not vectorize.
L2P_INLINE uint8_t to_e4m3(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  const uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  const float shifted = std::fabs(value) + 0x1p14f;  // whose last bit is that of values below 2^-6
  uint32_t small;
  std::memcpy(&small, &shifted, sizeof small);
  small -= (127 + 14) << 23;
  const uint32_t is_small = size < (127 - 6) << 23, is_nan = size > 0x7f800000;
  const uint32_t code = is_small * small + (1 - is_small) * normal;
  return static_cast<uint8_t>(sign | (code < 0x7e ? code : 0x7e) | is_nan * 0x7f);
}

// The largest |x * factor| over a row, or NaN where one is.
template <typename T, typename A>
L2P_INLINE A largest_of(const T* __restrict x, const A* __restrict factor, int64_t n) {
  A lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = larger<A>(std::abs(load(x[j + k]) * factor[j + k]), lanes[k]);
  }
  for (; j < n; ++j) lanes[0] = larger<A>(std::abs(load(x[j]) * factor[j]), lanes[0]);
  A found = 0;
  for (const A lane : lanes) found = larger(lane, found);
  return found;
}

// In 8 bits: the largest result is the largest |x * factor|, normed.
template <typename T>
L2P_INLINE void rounded_slab(const NormShape& s, const NormData& d, int64_t index) {
  using A = Accumulator<T>;
  const Slab slab = slab_at(s, index);
  const int64_t width = s.width;  // a byte that is written might be one of the shape's, as the compiler sees it
  std::vector<A> buffer(width);
  A* __restrict factor = buffer.data();
  fill_factor<T>(s, d, slab.group, factor);
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    const T* __restrict x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    uint8_t* __restrict out = static_cast<uint8_t*>(d.out) + row * width;
    const A squares = sum_over<A>(width, [&](int64_t j) L2P_INLINE_LAMBDA { return load(x[j]) * load(x[j]); });
    const A r = 1 / std::sqrt(squares / width + static_cast<A>(s.eps));
    const float scale = scale_of(static_cast<float>(r * largest_of(x, factor, width)), s.rounding);
    const A by = r / scale;
    d.row_scale[row] = scale;
    if (s.rounding == Rounding::int8) {
      for (int64_t j = 0; j < width; ++j) out[j] = to_int8(static_cast<float>(load(x[j]) * factor[j] * by));
    } else {
      for (int64_t j = 0; j < width; ++j) out[j] = to_e4m3(static_cast<float>(load(x[j]) * factor[j] * by));
    }
  }
}

template <typename T>
L2P_INLINE void forward_slab_rope(const NormShape& s, const NormData& d, int64_t index) {
  using A = Accumulator<T>;
  const Slab slab = slab_at(s, index);
  const T* weight = static_cast<const T*>(d.weight);
  std::vector<A> buffer(2 * s.width);
  A* __restrict own = buffer.data();             // by which a value's share of itself is multiplied
  A* __restrict other = buffer.data() + s.width;  // and its share of its pair's other value
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    if (row == slab.begin || row % s.heads == 0) {
      const float* cos = d.cos + angle_offset(s, row);
      const float* sin = d.sin + angle_offset(s, row);
      for (int64_t i = 0; i < s.width / 2; ++i) {
        own[2 * i] = load(weight[2 * i]) * cos[i];
        own[2 * i + 1] = load(weight[2 * i + 1]) * cos[i];
        other[2 * i] = load(weight[2 * i + 1]) * -sin[i];
        other[2 * i + 1] = load(weight[2 * i]) * sin[i];
      }
    }
    const T* __restrict x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    T* __restrict out = static_cast<T*>(d.out) + row * s.width;
    const A squares = sum_over<A>(s.width, [&](int64_t j) L2P_INLINE_LAMBDA { return load(x[j]) * load(x[j]); });
    const A r = 1 / std::sqrt(squares / s.width + static_cast<A>(s.eps));
    for (int64_t j = 0; j < s.width; j += 2) {
      const A a = load(x[j]) * r, b = load(x[j + 1]) * r;
      store(out[j], a * own[j] + b * other[j]);
      store(out[j + 1], b * own[j + 1] + a * other[j + 1]);
    }
  }
}

// y = x * r * factor, r = 1 / sqrt(mean(x^2) + eps): x's gradient, and grad * x * r added to the sums.
template <typename T, typename G, typename A>
L2P_INLINE void backward_row(const NormShape& s, const T* __restrict x, const G* __restrict grad,
                             const A* __restrict factor, T* __restrict x_grad, A* __restrict sums) {
  const A squares = sum_over<A>(s.width, [&](int64_t j) L2P_INLINE_LAMBDA { return load(x[j]) * load(x[j]); });
  const A dots = sum_over<A>(
      s.width, [&](int64_t j) L2P_INLINE_LAMBDA { return load(grad[j]) * factor[j] * load(x[j]); });
  const A r = 1 / std::sqrt(squares / s.width + static_cast<A>(s.eps));
  const A along = r * r * dots / s.width;
  for (int64_t j = 0; j < s.width; ++j) {
    const A value = load(x[j]), g = load(grad[j]);
    store(x_grad[j], r * (g * factor[j] - value * along));
    sums[j] += g * (value * r);
  }
}

template <typename T>
L2P_INLINE void backward_slab(const NormShape& s, const NormData& d, int64_t index) {
  using A = Accumulator<T>;
  const Slab slab = slab_at(s, index);
  std::vector<A> buffer(2 * s.width);
  A* factor = buffer.data();
  A* turned = buffer.data() + s.width;
  fill_factor<T>(s, d, slab.group, factor);
  A* sums = static_cast<A*>(d.sums) + index * s.width;
  std::fill_n(sums, s.width, A{0});
  for (int64_t row = slab.begin; row < slab.end; ++row) {
    const T* x = static_cast<const T*>(d.x) + row_offset(s, s.x_stride, row);
    const T* grad = static_cast<const T*>(d.grad) + row * s.width;
    T* x_grad = static_cast<T*>(d.x_grad) + row * s.width;
    if (d.cos == nullptr) {
      backward_row(s, x, grad, factor, x_grad, sums);
      continue;
    }
    const float* cos = d.cos + angle_offset(s, row);
    const float* sin = d.sin + angle_offset(s, row);
    for (int64_t i = 0; i < s.width / 2; ++i) {  // back by the same angle
      const A a = load(grad[2 * i]), b = load(grad[2 * i + 1]);
      turned[2 * i] = a * cos[i] + b * sin[i];
      turned[2 * i + 1] = b * cos[i] - a * sin[i];
    }
    backward_row(s, x, static_cast<const A*>(turned), factor, x_grad, sums);
  }
}

void forward_slabs(const NormShape& s, const NormData& d, Element element, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA {
    with_type(element, [&](auto type) L2P_INLINE_LAMBDA {
      for (int64_t index = begin; index < end; ++index) {
        if (d.cos != nullptr) {
          forward_slab_rope<decltype(type)>(s, d, index);
        } else if (s.rounding != Rounding::none) {
          rounded_slab<decltype(type)>(s, d, index);
        } else {
          forward_slab<decltype(type)>(s, d, index);
        }
      }
    });
  });
}

void backward_slabs(const NormShape& s, const NormData& d, Element element, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA {
    with_type(element, [&](auto type) L2P_INLINE_LAMBDA {
      for (int64_t index = begin; index < end; ++index) backward_slab<decltype(type)>(s, d, index);
    });
  });
}

// Slabs' sums to the gradients of weight and modulation, columns begin to end.
template <typename T>
void finish(const NormShape& s, const NormData& d, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const T* weight = static_cast<const T*>(d.weight);
  const int64_t slabs = slabs_of_group(s);
  std::vector<A> whole(end - begin), group(end - begin);
  for (int64_t g = 0; g < s.groups; ++g) {
    std::fill(group.begin(), group.end(), A{0});
    for (int64_t k = 0; k < slabs; ++k) {
      const A* sums = static_cast<const A*>(d.sums) + (g * slabs + k) * s.width;
      for (int64_t j = begin; j < end; ++j) group[j - begin] += sums[j];
    }
    const T* given = static_cast<const T*>(d.modulation) + g * s.modulation_stride;
    for (int64_t j = begin; j < end; ++j) {
      const A sum = group[j - begin];
      if (s.modulation == Modulation::none) {
        whole[j - begin] += sum;
        continue;
      }
      const A by = modulate<A>(s.modulation, load(given[j]));
      const A slope = s.modulation == Modulation::gate ? 1 - by * by : A{1};
      whole[j - begin] += sum * by;
      store(static_cast<T*>(d.modulation_grad)[g * s.width + j], sum * load(weight[j]) * slope);
    }
  }
  for (int64_t j = begin; j < end; ++j) store(static_cast<T*>(d.weight_grad)[j], whole[j - begin]);
}

}  // namespace

void norm_forward_cpu(const NormShape& s, const NormData& d, Element element) {
  prefer_huge_pages(d.out, row_count(s) * s.width * (s.rounding == Rounding::none ? element_bytes(element) : 1));
  torch::stable::parallel_for(0, s.groups * slabs_of_group(s), 1, [&](int64_t begin, int64_t end) {
    forward_slabs(s, d, element, begin, end);
  });
}

void norm_backward_cpu(const NormShape& s, const NormData& d, Element element) {
  prefer_huge_pages(d.x_grad, row_count(s) * s.width * element_bytes(element));
  torch::stable::parallel_for(0, s.groups * slabs_of_group(s), 1, [&](int64_t begin, int64_t end) {
    backward_slabs(s, d, element, begin, end);
  });
  torch::stable::parallel_for(0, s.width, 512, [&](int64_t begin, int64_t end) {
    with_type(element, [&](auto type) { finish<decltype(type)>(s, d, begin, end); });
  });
}

}  // namespace l2p
