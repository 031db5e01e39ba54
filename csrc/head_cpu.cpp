// Why: one level of the Detailer Head on a CPU with AVX-512 bfloat16 dot products, in one pass with PyTorch's own threads.
//
// Each thread takes a range of rows and keeps, of either input, the three rows under the window, taken apart into planes:
// one plane per pair of channels, in the fine input one for the even and one for the odd columns. Sixteen neighbours in a
// plane are one vector, so every multiplication is a full vector times a broadcast pair of weights, whatever the number
// of channels; up to 8 channels x 48 columns stay in registers over all taps. Even and odd columns (`phase`) are made one
// after the other, which is what the coarse input (its columns count twice) and the 2x2 maximum need.
#include "cpu.h"
#include "head.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

// GCC 12 takes its own intrinsics' placeholders for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

namespace l2p {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMargin = 16;  // words left of a plane's first column; the one before it is zero, as is the one after

// Words of a plane of `columns`: the last vector may reach over the end, as may its right neighbours.
int64_t plane_words(int64_t columns) { return kMargin + (columns + kLanes - 1) / kLanes * kLanes + 3 * kLanes + 16; }

__m512bh as_pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }

// Words of (low, high) pairs from two vectors of float, rounded to nearest even.
__m512i pack_pairs(__m512 low, __m512 high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

__m512 low_floats(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
__m512 high_floats(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// x / (1 + exp(-x)), to about 2^-14.
__m512 silu(__m512 x) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(t, whole);
  __m512 power = _mm512_set1_ps(0.0096181f);  // 2^rest on [-0.5, 0.5]
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.0555041f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.2402265f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.6931472f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
  const __m512 exponential = _mm512_scalef_ps(power, whole);
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(exponential, _mm512_set1_ps(1.0f))));
}

// A 16 x 16 square of words, mirrored.
__attribute__((always_inline)) inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1u << count) - 1);
}

// Pixels of `count` pairs, `stride` words apart -> planes, `pitch` words apart; columns beyond the last become zero.
void to_planes(const uint32_t* pixels, int64_t stride, int64_t columns, int64_t count, uint32_t* planes,
               int64_t pitch) {
  for (int64_t x = 0; x < columns; x += kLanes) {
    for (int64_t k = 0; k < count; k += kLanes) {
      const __mmask16 some = first_lanes(count - k);
      __m512i square[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = x + i < columns ? _mm512_maskz_loadu_epi32(some, pixels + (x + i) * stride + k)
                                    : _mm512_setzero_si512();
      }
      transpose(square);
      for (int64_t i = 0; i < std::min(kLanes, count - k); ++i) {
        _mm512_storeu_si512(planes + (k + i) * pitch + x, square[i]);
      }
    }
  }
}

// The reverse. Where pixels lie close together their writes meet in the cache.
void to_pixels(const uint32_t* planes, int64_t pitch, int64_t columns, int64_t count, uint32_t* pixels,
               int64_t stride) {
  for (int64_t x = 0; x < columns; x += kLanes) {
    for (int64_t k = 0; k < count; k += kLanes) {
      const __mmask16 some = first_lanes(count - k);
      __m512i square[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = k + i < count ? _mm512_loadu_si512(planes + (k + i) * pitch + x) : _mm512_setzero_si512();
      }
      transpose(square);
      for (int64_t i = 0; i < std::min(kLanes, columns - x); ++i) {
        _mm512_mask_storeu_epi32(pixels + (x + i) * stride + k, some, square[i]);
      }
    }
  }
}

float value_at(const Band& band, int64_t offset) {
  if (band.type == Element::f32) return static_cast<const float*>(band.data)[offset];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(band.data)[offset]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Even and odd columns of 32 neighbours from `offset` on; those at or beyond `columns` are zero.
void split_columns(const Band& band, int64_t offset, int64_t columns, __m512& even, __m512& odd) {
  if (band.stride[2] == 1 && columns >= 2 * kLanes) {
    if (band.type == Element::f32) {
      alignas(64) static constexpr int32_t kEven[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
      const float* values = static_cast<const float*>(band.data) + offset;
      const __m512 left = _mm512_loadu_ps(values), right = _mm512_loadu_ps(values + kLanes);
      const __m512i order = _mm512_load_si512(kEven);
      even = _mm512_permutex2var_ps(left, order, right);
      odd = _mm512_permutex2var_ps(left, _mm512_add_epi32(order, _mm512_set1_epi32(1)), right);
    } else {
      const __m512i words = _mm512_loadu_si512(static_cast<const uint16_t*>(band.data) + offset);
      even = low_floats(words);
      odd = high_floats(words);
    }
    return;
  }
  alignas(64) float values[2][kLanes] = {};
  for (int64_t x = 0; x < std::min(2 * kLanes, columns); ++x) {
    values[x % 2][x / 2] = value_at(band, offset + x * band.stride[2]);
  }
  even = _mm512_load_ps(values[0]);
  odd = _mm512_load_ps(values[1]);
}

// Any strides, float32 or bfloat16 -> (pair, even and odd) planes.
void picture_to_planes(const Band& band, int64_t offset, int64_t width, uint32_t* planes, int64_t pitch) {
  for (int64_t k = 0; k < pairs(band); ++k) {
    for (int64_t x = 0; x < width; x += 2 * kLanes) {
      const int64_t at = offset + 2 * k * band.stride[3] + x * band.stride[2];
      __m512 low[2], high[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      split_columns(band, at, width - x, low[0], low[1]);
      if (2 * k + 1 < band.channels) split_columns(band, at + band.stride[3], width - x, high[0], high[1]);
      for (int p = 0; p < 2; ++p) {
        _mm512_storeu_si512(planes + (2 * k + p) * pitch + x / 2, pack_pairs(low[p], high[p]));
      }
    }
  }
}

// The three rows of an input that lie under the window, as planes.
class Rows {
 public:
  Rows(const Band& band, int64_t height, int64_t width, bool split, int64_t columns)
      : band_(band), height_(height), width_(width), split_(split), pitch_(plane_words(columns)),
        row_words_(pairs(band) * (split ? 2 : 1) * pitch_), words_(4 * row_words_, 0) {}

  int64_t pitch() const { return pitch_; }

  // The first column of pair 0 of row y; outside the picture all is zero. Valid until y + 2 is asked for.
  const uint32_t* row(int64_t sample, int64_t y) {
    if (y < 0 || y >= height_) return words_.data() + 3 * row_words_ + kMargin;
    const int64_t slot = y % 3;
    uint32_t* planes = words_.data() + slot * row_words_ + kMargin;
    if (held_[slot] != y || sample_ != sample) {
      if (sample_ != sample) held_[0] = held_[1] = held_[2] = -1;
      sample_ = sample;
      held_[slot] = y;
      const int64_t offset = sample * band_.stride[0] + (y - band_.start) * band_.stride[1];
      const bool dense = band_.stride[3] == 1 && band_.stride[2] == band_.channels && band_.channels % 2 == 0;
      if (split_ && !(dense && band_.type == Element::bf16)) {
        picture_to_planes(band_, offset, width_, planes, pitch_);
      } else {
        const auto* pixels = reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(band_.data) + offset);
        const int64_t count = pairs(band_);
        if (split_) {
          to_planes(pixels, 2 * count, width_ / 2, count, planes, 2 * pitch_);
          to_planes(pixels + count, 2 * count, width_ / 2, count, planes + pitch_, 2 * pitch_);
        } else {
          to_planes(pixels, count, width_, count, planes, pitch_);
        }
      }
    }
    return planes;
  }

 private:
  const Band& band_;
  int64_t height_, width_;
  bool split_;
  int64_t pitch_, row_words_, sample_ = -1;
  int64_t held_[3] = {-1, -1, -1};
  std::vector<uint32_t> words_;
};

// One input's nine taps at one row and phase.
struct Window {
  const uint32_t* taps[kTaps];
  int64_t step;   // words between the planes of two pairs
  int64_t pairs;  // 0: no such input
};

template <int CB, int NV>
__attribute__((always_inline)) inline void accumulate(__m512 (&sums)[CB][NV], const Window& window, int64_t column,
                                                      const uint32_t* weights) {
  for (int tap = 0; tap < kTaps; ++tap) {
    const uint32_t* x = window.taps[tap] + column;
    for (int64_t k = 0; k < window.pairs; ++k, x += window.step, weights += kBlock) {
      __m512bh columns[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) columns[v] = as_pairs(_mm512_loadu_si512(x + v * kLanes));
#pragma GCC unroll 8
      for (int c = 0; c < CB; ++c) {
        const __m512bh weight = as_pairs(_mm512_set1_epi32(static_cast<int>(weights[c])));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sums[c][v] = _mm512_dpbf16_ps(sums[c][v], columns[v], weight);
      }
    }
  }
}

// CB channels of one block at NV vectors of one phase's columns, through SiLU, into planes of pairs.
template <int CB, int NV>
void block_columns(const Window& fine, const uint32_t* fine_weights, const Window& coarse,
                   const uint32_t* coarse_weights, const float* bias, const float* edge, int64_t edge_column,
                   int64_t column, uint32_t* planes, int64_t step) {
  __m512 sums[CB][NV];
  for (int c = 0; c < CB; ++c) {
    for (int v = 0; v < NV; ++v) sums[c][v] = _mm512_set1_ps(bias[c]);
  }
  accumulate<CB, NV>(sums, fine, column, fine_weights);
  if (coarse.pairs > 0) {
    accumulate<CB, NV>(sums, coarse, column, coarse_weights);
    for (int v = 0; v < NV; ++v) {
      const int64_t lane = edge_column - column - v * kLanes;
      if (lane < 0 || lane >= kLanes) continue;
      const __mmask16 only = static_cast<__mmask16>(1u << lane);
      for (int c = 0; c < CB; ++c) sums[c][v] = _mm512_mask_add_ps(sums[c][v], only, sums[c][v], _mm512_set1_ps(edge[c]));
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < CB; c += 2) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      _mm512_storeu_si512(planes + c / 2 * step + column + v * kLanes,
                          pack_pairs(silu(sums[c][v]), silu(sums[c + 1][v])));
    }
  }
}

using BlockColumns = decltype(&block_columns<8, 3>);

BlockColumns block_columns_for(int64_t channels, int64_t vectors) {
  if (channels > 4) return vectors == 3 ? block_columns<8, 3> : vectors == 2 ? block_columns<8, 2> : block_columns<8, 1>;
  return vectors == 3 ? block_columns<4, 3> : vectors == 2 ? block_columns<4, 2> : block_columns<4, 1>;
}

__m512i max_pairs(__m512i a, __m512i b) {
  const __m512i low = _mm512_castps_si512(_mm512_max_ps(low_floats(a), low_floats(b)));
  const __m512i high = _mm512_castps_si512(_mm512_max_ps(high_floats(a), high_floats(b)));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}

// All rows that one thread makes.
class Worker {
 public:
  explicit Worker(const HeadLevel& level)
      : s_(level), columns_(level.width / 2), fine_(level.fine, level.height, level.width, true, columns_),
        coarse_(level.coarse, level.height / 2, columns_, false, columns_), pitch_(plane_words(columns_)),
        planes_(2 * row_words()), edge_(2 * blocks(level) * kBlock) {}

  void row(int64_t sample, int64_t y) {
    uint32_t* planes = planes_.data() + y % 2 * row_words();
    const int64_t rows = s_.stop - s_.start, count = s_.channels / 2;
    convolve(sample, y, planes);
    if (s_.out != nullptr) {
      auto* pixels = reinterpret_cast<uint32_t*>(s_.out) + (sample * rows + y - s_.start) * s_.width * count;
      to_pixels(planes, 2 * pitch_, columns_, count, pixels, 2 * count);
      to_pixels(planes + pitch_, 2 * pitch_, columns_, count, pixels + count, 2 * count);
    }
    if (s_.pooled != nullptr && y % 2 == 1) {
      pool();
      auto* pixels = reinterpret_cast<uint32_t*>(s_.pooled);
      pixels += (sample * (rows / 2) + y / 2 - s_.start / 2) * columns_ * count;
      to_pixels(planes_.data(), 2 * pitch_, columns_, count, pixels, count);
    }
    if (s_.picture != nullptr) draw(planes, s_.picture + (sample * 3 * rows + y - s_.start) * s_.width, rows * s_.width);
  }

 private:
  int64_t row_words() const { return blocks(s_) * kBlock * pitch_; }

  void convolve(int64_t sample, int64_t y, uint32_t* planes) {
    const bool decoder = s_.coarse.channels > 0;
    const int64_t type = decoder ? row_type(s_, y) : 0;
    const uint32_t *fine_rows[3], *coarse_rows[3] = {};
    for (int i = 0; i < 3; ++i) fine_rows[i] = fine_.row(sample, y + i - 1);
    if (decoder) {
      for (int i = 0; i < 3; ++i) coarse_rows[i] = coarse_.row(sample, y / 2 + i - 1);
      add_up_edges(type, coarse_rows);
    }
    Window fine[2], coarse{{}, coarse_.pitch(), pairs(s_.coarse)};
    for (int phase = 0; phase < 2; ++phase) {
      fine[phase].step = 2 * fine_.pitch();
      fine[phase].pairs = pairs(s_.fine);
      for (int tap = 0; tap < kTaps; ++tap) {
        const int x = phase + tap % 3 - 1;  // -1 .. 2, relative to the even column
        fine[phase].taps[tap] = fine_rows[tap / 3] + (x & 1) * fine_.pitch() + (x >> 1);
      }
    }
    for (int tap = 0; decoder && tap < kTaps; ++tap) coarse.taps[tap] = coarse_rows[tap / 3] + tap % 3 - 1;

    const int64_t vectors = (columns_ + kLanes - 1) / kLanes;
    for (int64_t block = 0; block < blocks(s_); ++block) {
      const float* bias = s_.bias + (type * blocks(s_) + block) * kBlock;
      for (int phase = 0; phase < 2; ++phase) {
        const uint32_t* coarse_weights = s_.coarse_weight + (decoder ? coarse_weights_at(s_, type, phase, block) : 0);
        uint32_t* to = planes + block * kBlock * pitch_ + phase * pitch_;
        for (int64_t done = 0; done < vectors;) {
          const int64_t left = vectors - done, take = left == 4 ? 2 : std::min<int64_t>(left, 3);
          block_columns_for(s_.channels - block * kBlock, take)(
              fine[phase], s_.fine_weight + fine_weights_at(s_, block), coarse, coarse_weights, bias,
              edge_.data() + (phase * blocks(s_) + block) * kBlock, phase == 0 ? 0 : columns_ - 1, done * kLanes, to,
              2 * pitch_);
          done += take;
        }
      }
    }
  }

  // What the first (side 0, even) and the last (side 1, odd) column take beside the others' weights.
  void add_up_edges(int64_t type, const uint32_t* const (&rows)[3]) {
    for (int64_t side = 0; side < 2; ++side) {
      for (int64_t block = 0; block < blocks(s_); ++block) {
        const uint32_t* weights = s_.edge_weight + edge_weights_at(s_, type, side, block);
        const int64_t at = (side * blocks(s_) + block) * kBlock;
        __m256 sum = _mm256_loadu_ps(s_.edge_bias + type * 2 * blocks(s_) * kBlock + at);
        for (const uint32_t* row : rows) {
          const uint32_t* x = row + (side == 0 ? 0 : columns_ - 1);
          for (int64_t k = 0; k < pairs(s_.coarse); ++k, x += coarse_.pitch(), weights += kBlock) {
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
            sum = _mm256_dpbf16_ps(sum, reinterpret_cast<__m256bh>(words),
                                   reinterpret_cast<__m256bh>(_mm256_set1_epi32(static_cast<int>(*x))));
          }
        }
        _mm256_storeu_ps(edge_.data() + at, sum);
      }
    }
  }

  // The maximum of both rows and both phases, into the first row's even planes.
  void pool() {
    uint32_t *upper = planes_.data(), *lower = upper + row_words();
    for (int64_t k = 0; k < s_.channels / 2; ++k) {
      uint32_t *a = upper + 2 * k * pitch_, *b = lower + 2 * k * pitch_;
      for (int64_t x = 0; x < columns_; x += kLanes) {
        const __m512i top = max_pairs(_mm512_loadu_si512(a + x), _mm512_loadu_si512(a + pitch_ + x));
        const __m512i bottom = max_pairs(_mm512_loadu_si512(b + x), _mm512_loadu_si512(b + pitch_ + x));
        _mm512_storeu_si512(a + x, max_pairs(top, bottom));
      }
    }
  }

  // The last 1x1 convolution, to three planes `plane` elements apart.
  void draw(const uint32_t* planes, uint16_t* picture, int64_t plane) {
    const auto* weights = reinterpret_cast<const uint32_t*>(s_.out_weight);
    for (int64_t x = 0; x < columns_; x += kLanes) {
      for (int64_t c = 0; c < 3; ++c) {
        __m512 sums[2] = {_mm512_set1_ps(s_.out_bias[c]), _mm512_set1_ps(s_.out_bias[c])};
        for (int64_t k = 0; k < s_.channels / 2; ++k) {
          const __m512bh weight = as_pairs(_mm512_set1_epi32(static_cast<int>(weights[c * blocks(s_) * kBlock / 2 + k])));
          for (int phase = 0; phase < 2; ++phase) {
            const __m512i values = _mm512_loadu_si512(planes + (2 * k + phase) * pitch_ + x);
            sums[phase] = _mm512_dpbf16_ps(sums[phase], as_pairs(values), weight);
          }
        }
        _mm512_mask_storeu_epi32(picture + c * plane + 2 * x, first_lanes(columns_ - x), pack_pairs(sums[0], sums[1]));
      }
    }
  }

  const HeadLevel& s_;
  int64_t columns_;
  Rows fine_, coarse_;
  int64_t pitch_;
  std::vector<uint32_t> planes_;  // two rows of the output: (pair, even and odd)
  std::vector<float> edge_;       // (side, channel)
};

}  // namespace

void head_level_cpu(const HeadLevel& level) {
  const int64_t rows = level.stop - level.start, step = level.pooled != nullptr ? 2 : 1;
  torch::stable::parallel_for(0, level.batch * rows / step, 4, [&](int64_t begin, int64_t end) {
    Worker worker(level);
    for (int64_t index = begin * step; index < end * step; ++index) {
      worker.row(index / rows, level.start + index % rows);
    }
  });
}

}  // namespace l2p

#pragma GCC pop_options
#pragma GCC diagnostic pop

namespace l2p {

bool head_level_cpu_runs_here() {
  return this_cpu() == Cpu::avx512 && __builtin_cpu_supports("avx512bf16");
}

}  // namespace l2p

#else

namespace l2p {

bool head_level_cpu_runs_here() { return false; }
void head_level_cpu(const HeadLevel&) {}

}  // namespace l2p

#endif
