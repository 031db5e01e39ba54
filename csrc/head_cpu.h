// One level of the Detailer Head on a CPU, in one pass with PyTorch's own threads, on vectors of any width and of
// either element. A source includes this file inside its `#pragma GCC target` and after all other headers, defines what
// `V` below stands for, and so gets the code for one kind of processor.
//
// Each thread takes groups of rows and keeps, of either input, the rows under the window, taken apart into planes of
// 32-bit words: one plane per channel of float32 or pair of channels of bfloat16, in the fine input one for the even and
// one for the odd columns. Neighbors in a plane are one vector, so every multiplication is a full vector times a
// broadcast weight, whatever the number of channels, and a block of outputs x columns stays in registers over many taps.
// Even and odd columns (`phase`) are made one after the other, which is what the coarse input (its columns count twice)
// and the 2x2 maximum need.
//
// float32 multiplies 12 times where two rows of a 3x3 convolution have 18 taps: Winograd's F(2, 3) along the columns of
// the image. From rows a to d come a - c, b + c, c - b and b - d, and of their products m with the weights' counterparts
// (ops/head.py packs those) the two rows m0 + m1 + m2 and m1 - m2 - m3.
//
// V: kLanes words of a vector; kType, the element of maps and weights, kPer of them in a word; kParts multiplications of
// a word; outputs(vectors), how many outputs of so many vectors stay in registers; Words, Floats, Operand (a part of
// Words, as it is multiplied) and the functions used below.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "head.h"

namespace l2p {
namespace {

constexpr int64_t kMargin = 16;  // words left of a plane's first column; the one before it is zero, as is the one after
constexpr int64_t kChunk = 64;   // planes of a row of which some columns stay in the first cache over all outputs

// Words of a plane of `columns`: the last vector may reach over the end, as may its right neighbors.
inline int64_t plane_words(int64_t columns) { return kMargin + (columns + 15) / 16 * 16 + 4 * 16; }

// Zeros, of which the first is the first of a cache line.
class Planes {
 public:
  explicit Planes(int64_t words) : words_(words + 16, 0) {}
  uint32_t* data() { return words_.data() + (64 - reinterpret_cast<uintptr_t>(words_.data()) % 64) % 64 / 4; }

 private:
  std::vector<uint32_t> words_;
};

// Of a pixel of so many input channels: an odd number is filled up.
template <class V>
int64_t words_of(int64_t channels) { return (channels + 1) / 2 * 2 / V::kPer; }

// Pixels of `count` words, `stride` words apart -> planes, `pitch` words apart; columns beyond the last become zero.
template <class V>
void to_planes(const uint32_t* pixels, int64_t stride, int64_t columns, int64_t count, uint32_t* planes,
               int64_t pitch) {
  for (int64_t x = 0; x < columns; x += V::kLanes) {
    for (int64_t k = 0; k < count; k += V::kLanes) {
      typename V::Words square[V::kLanes];
      for (int64_t i = 0; i < V::kLanes; ++i) {
        square[i] = V::load_first(pixels + (x + i) * stride + k, x + i < columns ? count - k : 0);
      }
      V::transpose(square);
      for (int64_t i = 0; i < std::min(V::kLanes, count - k); ++i) V::store(planes + (k + i) * pitch + x, square[i]);
    }
  }
}

// The reverse. Where pixels lie close together their writes meet in the cache.
template <class V>
void to_pixels(const uint32_t* planes, int64_t pitch, int64_t columns, int64_t count, uint32_t* pixels,
               int64_t stride) {
  for (int64_t x = 0; x < columns; x += V::kLanes) {
    for (int64_t k = 0; k < count; k += V::kLanes) {
      typename V::Words square[V::kLanes];
      for (int64_t i = 0; i < V::kLanes; ++i) {
        square[i] = V::load_first(planes + (k + i) * pitch + x, k + i < count ? V::kLanes : 0);
      }
      V::transpose(square);
      for (int64_t i = 0; i < std::min(V::kLanes, columns - x); ++i) {
        V::store_first(pixels + (x + i) * stride + k, count - k, square[i]);
      }
    }
  }
}

inline float value_at(const Band& band, int64_t offset) {
  if (band.type == Element::f32) return static_cast<const float*>(band.data)[offset];
  return load(static_cast<const Bits16*>(band.data)[offset]);
}

// Even and odd columns of two vectors of neighbors from `offset` on; those at or beyond `columns` are zero.
template <class V>
void split_columns(const Band& band, int64_t offset, int64_t columns, typename V::Floats& even,
                   typename V::Floats& odd) {
  if (band.stride[2] == 1 && columns >= 2 * V::kLanes) {
    if (band.type == Element::f32) {
      V::deinterleave(static_cast<const float*>(band.data) + offset, even, odd);
    } else {
      const auto words = V::load(static_cast<const uint16_t*>(band.data) + offset);
      even = V::low_floats(words);
      odd = V::high_floats(words);
    }
    return;
  }
  float values[2][V::kLanes] = {};
  for (int64_t x = 0; x < std::min(2 * V::kLanes, columns); ++x) {
    values[x % 2][x / 2] = value_at(band, offset + x * band.stride[2]);
  }
  even = V::load_floats(values[0]);
  odd = V::load_floats(values[1]);
}

// Any strides, float32 or bfloat16 -> (word, even and odd) planes.
template <class V>
void image_to_planes(const Band& band, int64_t offset, int64_t width, uint32_t* planes, int64_t pitch) {
  for (int64_t k = 0; k < words_of<V>(band.channels); ++k) {
    for (int64_t x = 0; x < width; x += 2 * V::kLanes) {
      typename V::Floats columns[2][V::kPer];
      for (int64_t i = 0; i < V::kPer; ++i) {
        const int64_t channel = V::kPer * k + i, at = offset + channel * band.stride[3] + x * band.stride[2];
        split_columns<V>(band, at, channel < band.channels ? width - x : 0, columns[0][i], columns[1][i]);
      }
      for (int p = 0; p < 2; ++p) V::store(planes + (2 * k + p) * pitch + x / 2, V::join(columns[p]));
    }
  }
}

// The rows of an input that lie under the window of two of its rows, as planes; and what Winograd makes of them.
template <class V>
class Rows {
 public:
  // Rows outside [first, last) are zero: outside the image, or of no use to the band. Room for `pairs` transformed pairs.
  Rows(const Band& band, int64_t first, int64_t last, int64_t width, bool split, int64_t columns, int64_t pairs)
      : band_(band), first_(first), last_(last), width_(width), split_(split), pitch_(plane_words(columns)),
        row_words_(words_of<V>(band.channels) * (split ? 2 : 1) * pitch_), words_((5 + 4 * pairs) * row_words_) {}

  int64_t pitch() const { return pitch_; }

  // The first column of plane 0 of row y. Valid until y + 4 is asked for.
  const uint32_t* row(int64_t sample, int64_t y) {
    if (y < first_ || y >= last_) return words_.data() + 4 * row_words_ + kMargin;
    const int64_t slot = y % 4;
    uint32_t* planes = words_.data() + slot * row_words_ + kMargin;
    if (held_[slot] != y || sample_ != sample) {
      if (sample_ != sample) held_[0] = held_[1] = held_[2] = held_[3] = -1;
      sample_ = sample;
      held_[slot] = y;
      const int64_t offset = sample * band_.stride[0] + (y - band_.start) * band_.stride[1];
      const bool dense = band_.stride[3] == 1 && band_.stride[2] == band_.channels && band_.channels % 2 == 0;
      if (split_ && !(dense && band_.type == V::kType)) {
        image_to_planes<V>(band_, offset, width_, planes, pitch_);
      } else {
        const auto* pixels = static_cast<const uint32_t*>(band_.data) + offset / V::kPer;
        const int64_t count = words_of<V>(band_.channels);
        if (split_) {
          to_planes<V>(pixels, 2 * count, width_ / 2, count, planes, 2 * pitch_);
          to_planes<V>(pixels + count, 2 * count, width_ / 2, count, planes + pitch_, 2 * pitch_);
        } else {
          to_planes<V>(pixels, count, width_, count, planes, pitch_);
        }
      }
    }
    return planes;
  }

  // Winograd's four rows for the rows y and y + 1, made in the place of `pair`: part i is `part(pair, i)`.
  void transform(int64_t sample, int64_t y, int64_t pair) {
    const uint32_t* rows[4];
    uint32_t* parts[4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = row(sample, y + i - 1) - kMargin;
      parts[i] = part(pair, i) - kMargin;
    }
    for (int64_t x = 0; x < row_words_; x += V::kLanes) {
      const auto a = V::floats(V::load(rows[0] + x)), b = V::floats(V::load(rows[1] + x));
      const auto c = V::floats(V::load(rows[2] + x)), d = V::floats(V::load(rows[3] + x));
      V::store(parts[0] + x, V::words(a - c));
      V::store(parts[1] + x, V::words(b + c));
      V::store(parts[2] + x, V::words(c - b));
      V::store(parts[3] + x, V::words(b - d));
    }
  }
  uint32_t* part(int64_t pair, int64_t i) { return words_.data() + (5 + 4 * pair + i) * row_words_ + kMargin; }

 private:
  const Band& band_;
  int64_t first_, last_, width_;
  bool split_;
  int64_t pitch_, row_words_, sample_ = -1;
  int64_t held_[4] = {-1, -1, -1, -1};
  Planes words_;
};

constexpr int kRows = 4;  // of a group at most

// What one input, or one of Winograd's rows of it, adds to a group of rows, at one phase.
struct Term {
  const uint32_t* taps[kTaps];
  int count;             // of taps: 9, or 3 of a row
  int64_t step, words;   // between two planes; planes
  const uint32_t* weights;
  int64_t block_words;
  int8_t sign[kRows];
};

// A row that is made, at one phase.
struct Line {
  const float *bias, *edge;  // by output; what the column `edge_column` adds, null: none
  uint32_t* planes;          // null: not wanted
};

// What `count` planes of a term from `first` on add to CB outputs at NV vectors of columns: to totals (output, row, vector).
// Not inlined: all that its innermost loop needs then has a register.
template <class V, int CB, int NV>
__attribute__((noinline)) void add_products(const Term& term, int64_t first, int64_t count, int64_t output, int64_t column,
                  typename V::Floats* totals) {
  typename V::Floats sums[CB][NV];
#pragma GCC unroll 8
  for (int c = 0; c < CB; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[c][v] = V::set(0);
  }
  const uint32_t* weights =
      term.weights + output / kBlock * term.block_words + first * kBlock + output % kBlock;
  const int64_t step = term.step, next = term.block_words;
  for (int tap = 0; tap < term.count; ++tap, weights += term.words * kBlock) {
    const uint32_t* x = term.taps[tap] + first * term.step + column;
    const uint32_t* w = weights;
    for (int64_t k = 0; k < count; ++k, x += step, w += kBlock) {
      __builtin_prefetch(w + next);  // the next outputs': too far for the processor to guess
#pragma GCC unroll 2
      for (int part = 0; part < V::kParts; ++part) {
        typename V::Operand columns[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) columns[v] = V::operand(V::load(x + v * V::kLanes), part);
#pragma GCC unroll 8
        for (int c = 0; c < CB; ++c) {
          const typename V::Operand weight = V::operand(V::broadcast(w[c]), part);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) sums[c][v] = V::multiply_add(columns[v], weight, sums[c][v]);
        }
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    if (term.sign[row] == 0) continue;
    const typename V::Floats sign = V::set(term.sign[row]);
#pragma GCC unroll 8
    for (int c = 0; c < CB; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) totals[((output + c) * kRows + row) * NV + v] += sign * sums[c][v];
    }
  }
}

// All groups of rows that one thread makes.
template <class V>
class Worker {
 public:
  // Rows of a group: Winograd's two, of the coarse input too, or the two of a maximum.
  static constexpr int kGroup = V::kWinograd ? 4 : 2;

  explicit Worker(const HeadLevel& level)
      : s_(level), decoder_(level.coarse.channels > 0), columns_(level.width / 2), count_(level.channels / V::kPer),
        fine_(level.fine, std::max<int64_t>(level.start - 1, 0), std::min(level.stop + 1, level.height), level.width,
              true, columns_, V::kWinograd ? 2 : 0),
        coarse_(level.coarse, std::max<int64_t>(level.start / 2 - 1, 0),
                std::min((level.stop + 1) / 2 + 1, level.height / 2), columns_, false, columns_, V::kWinograd ? 1 : 0),
        pitch_(plane_words(columns_)), planes_(kGroup * row_words()),
        totals_(blocks(level) * kBlock * kRows * 3 * V::kLanes),
        edge_(kGroup * 2 * blocks(level) * kBlock + V::kLanes) {}

  // Rows [y, y + kGroup) of the image, y a multiple of that, as far as they are wanted.
  void group(int64_t sample, int64_t y) {
    const int64_t rows = s_.stop - s_.start;
    convolve(sample, y);
    for (int64_t row = std::max(y, s_.start); row < std::min(y + kGroup, s_.stop); ++row) {
      uint32_t* planes = planes_.data() + (row - y) * row_words();
      if (s_.out != nullptr) {
        auto* pixels = static_cast<uint32_t*>(s_.out) + (sample * rows + row - s_.start) * s_.width * count_;
        to_pixels<V>(planes, 2 * pitch_, columns_, count_, pixels, 2 * count_);
        to_pixels<V>(planes + pitch_, 2 * pitch_, columns_, count_, pixels + count_, 2 * count_);
      }
      if (s_.pooled != nullptr && row % 2 == 1) {
        pool(planes - row_words());
        auto* pixels = static_cast<uint32_t*>(s_.pooled);
        pixels += (sample * (rows / 2) + row / 2 - s_.start / 2) * columns_ * count_;
        to_pixels<V>(planes - row_words(), 2 * pitch_, columns_, count_, pixels, count_);
      }
      if (s_.image != nullptr) {
        for (int64_t c = 0; c < 3; ++c) draw(planes, c, ((sample * 3 + c) * rows + row - s_.start) * columns_);
      }
    }
  }

 private:
  int64_t row_words() const { return 2 * blocks(s_) * kBlock / V::kPer * pitch_; }
  bool wanted(int64_t y) const { return y >= s_.start && y < s_.stop; }
  int64_t type_of(int64_t y) const { return decoder_ ? row_type(s_, y) : 0; }

  void convolve(int64_t sample, int64_t y) {
    terms_[0].clear(), terms_[1].clear();
    V::kWinograd ? add_transformed(sample, y) : add_rows(sample, y);
    Line lines[2][kRows] = {};
    for (int row = 0; row < kGroup; ++row) {
      if (!wanted(y + row)) continue;
      const int64_t type = type_of(y + row);
      if (decoder_) add_up_edges(sample, y + row, row);
      for (int phase = 0; phase < 2; ++phase) {
        lines[phase][row] = {s_.bias + type * blocks(s_) * kBlock,
                             decoder_ ? edge_.data() + (row * 2 + phase) * blocks(s_) * kBlock : nullptr,
                             planes_.data() + row * row_words() + phase * pitch_};
      }
    }
    const int64_t vectors = (columns_ + V::kLanes - 1) / V::kLanes;
    for (int64_t done = 0; done < vectors;) {
      const int64_t left = vectors - done, take = left == 4 ? 2 : std::min<int64_t>(left, 3);
      for (int phase = 0; phase < 2; ++phase) {
        if (take == 3) add_up<3>(phase, lines[phase], done * V::kLanes);
        if (take == 2) add_up<2>(phase, lines[phase], done * V::kLanes);
        if (take == 1) add_up<1>(phase, lines[phase], done * V::kLanes);
      }
      done += take;
    }
  }

  // All outputs of a group at NV vectors of one phase's columns. Terms and parts of them come first, so that columns and
  // totals stay in the caches; weights are read once and in order.
  template <int NV>
  void add_up(int phase, const Line (&lines)[kRows], int64_t column) {
    auto* totals = reinterpret_cast<typename V::Floats*>(totals_.data());
    for (int64_t output = 0; output < s_.channels; ++output) {
      for (int row = 0; row < kGroup; ++row) {
        const auto bias = V::set(lines[row].planes != nullptr ? lines[row].bias[output] : 0);
        for (int v = 0; v < NV; ++v) totals[(output * kRows + row) * NV + v] = bias;
      }
    }
    for (const Term& term : terms_[phase]) {
      for (int64_t first = 0; first < term.words; first += kChunk) {
        const int64_t count = std::min(kChunk, term.words - first);
        for (int64_t output = 0; output < s_.channels;) {
          if (V::outputs(NV) == kBlock && s_.channels - output > 4) {
            add_products<V, kBlock, NV>(term, first, count, output, column, totals);
            output += kBlock;
          } else {
            add_products<V, 4, NV>(term, first, count, output, column, totals);
            output += 4;
          }
        }
      }
    }
    for (int row = 0; row < kGroup; ++row) {
      if (lines[row].planes != nullptr) finish<NV>(totals + row * NV, lines[row], phase * (columns_ - 1), column);
    }
  }

  // Totals through SiLU into a row's planes.
  template <int NV>
  __attribute__((noinline)) void finish(typename V::Floats* totals, const Line& line, int64_t edge_column, int64_t column) {
    const int64_t lane = edge_column - column;
    for (int64_t output = 0; output < s_.channels; output += V::kPer) {
      if (line.edge != nullptr && lane >= 0 && lane < NV * V::kLanes) {
        for (int64_t i = 0; i < V::kPer; ++i) {
          auto& total = totals[(output + i) * kRows * NV + lane / V::kLanes];
          total = V::add_to_lane(total, lane % V::kLanes, line.edge[output + i]);
        }
      }
      for (int v = 0; v < NV; ++v) {
        typename V::Floats values[V::kPer];
        for (int64_t i = 0; i < V::kPer; ++i) values[i] = V::silu(totals[(output + i) * kRows * NV + v]);
        V::store(line.planes + output / V::kPer * 2 * pitch_ + column + v * V::kLanes, V::join(values));
      }
    }
  }

  // The window over each wanted row.
  void add_rows(int64_t sample, int64_t y) {
    for (int row = 0; row < kGroup; ++row) {
      if (!wanted(y + row)) continue;
      for (int phase = 0; phase < 2; ++phase) {
        Term fine = fine_term(kTaps), coarse = coarse_term(kTaps, type_of(y + row), phase);
        for (int tap = 0; tap < kTaps; ++tap) {
          set_fine_tap(fine, tap, fine_.row(sample, y + row + tap / 3 - 1), phase);
          if (decoder_) coarse.taps[tap] = coarse_.row(sample, (y + row) / 2 + tap / 3 - 1) + tap % 3 - 1;
        }
        fine.sign[row] = coarse.sign[row] = 1;
        terms_[phase].push_back(fine);
        if (decoder_) terms_[phase].push_back(coarse);
      }
    }
  }

  // Winograd's rows, as far as wanted rows need them.
  void add_transformed(int64_t sample, int64_t y) {
    for (int pair = 0; pair < 2; ++pair) {
      const bool first = wanted(y + 2 * pair), second = wanted(y + 2 * pair + 1);
      if (!first && !second) continue;
      fine_.transform(sample, y + 2 * pair, pair);
      for (int part = 0; part < 4; ++part) {
        for (int phase = 0; phase < 2; ++phase) {
          Term term = fine_term(3);
          for (int tap = 0; tap < 3; ++tap) set_fine_tap(term, tap, fine_.part(pair, part), phase);
          add_part(term, phase, part, first ? 2 * pair : -1, second ? 2 * pair + 1 : -1);
        }
      }
    }
    if (!decoder_) return;
    coarse_.transform(sample, y / 2, 0);
    for (int odd = 0; odd < 2; ++odd) {  // rows odd and odd + 2 lie over neighbors of the coarse input
      const int first = wanted(y + odd) ? odd : -1, second = wanted(y + odd + 2) ? odd + 2 : -1;
      const bool alike = first >= 0 && second >= 0 && type_of(y + first) == type_of(y + second);
      if (first >= 0) add_coarse(type_of(y + first), first, alike ? second : -1);
      if (second >= 0 && !alike) add_coarse(type_of(y + second), -1, second);
    }
  }

  void add_coarse(int64_t type, int first, int second) {
    for (int part = 0; part < 4; ++part) {
      for (int phase = 0; phase < 2; ++phase) {
        Term term = coarse_term(3, type, phase);
        for (int tap = 0; tap < 3; ++tap) term.taps[tap] = coarse_.part(0, part) + tap - 1;
        add_part(term, phase, part, first, second);
      }
    }
  }

  // A product of Winograd's, for the rows `first` and `second` of the group, -1: not wanted.
  void add_part(Term& term, int phase, int part, int first, int second) {
    constexpr int8_t kSigns[4][2] = {{1, 0}, {1, 1}, {1, -1}, {0, -1}};
    if (first >= 0) term.sign[first] = kSigns[part][0];
    if (second >= 0) term.sign[second] = kSigns[part][1];
    if (!std::any_of(term.sign, term.sign + kRows, [](int8_t sign) { return sign != 0; })) return;
    term.weights += part * 3 * term.words * kBlock;
    terms_[phase].push_back(term);
  }

  Term fine_term(int taps) {
    return {{}, taps, 2 * fine_.pitch(), words_of<V>(s_.fine.channels), s_.fine_weight, fine_weights_at(s_, 1), {}};
  }
  Term coarse_term(int taps, int64_t type, int phase) {
    return {{}, taps, coarse_.pitch(), words_of<V>(s_.coarse.channels),
            s_.coarse_weight + (decoder_ ? coarse_weights_at(s_, type, phase, 0) : 0),
            coarse_weights_at(s_, 0, 0, 1), {}};
  }
  void set_fine_tap(Term& term, int tap, const uint32_t* row, int phase) {
    const int x = phase + tap % 3 - 1;  // -1 .. 2, relative to the even column
    term.taps[tap] = row + (x & 1) * fine_.pitch() + (x >> 1);
  }

  // What the first (side 0, even) and the last (side 1, odd) column of row y take beside the others' weights.
  void add_up_edges(int64_t sample, int64_t y, int64_t row) {
    const int64_t type = row_type(s_, y);
    for (int64_t side = 0; side < 2; ++side) {
      for (int64_t block = 0; block < blocks(s_); ++block) {
        const uint32_t* weights = s_.edge_weight + edge_weights_at(s_, type, side, block);
        const int64_t at = (side * blocks(s_) + block) * kBlock;
        typename V::Floats sum = V::set(0);
        for (int i = -1; i < 2; ++i) {
          const uint32_t* x = coarse_.row(sample, y / 2 + i) + (side == 0 ? 0 : columns_ - 1);
          for (int64_t k = 0; k < words_of<V>(s_.coarse.channels); ++k, x += coarse_.pitch(), weights += kBlock) {
            const auto some = V::load_first(weights, kBlock), all = V::broadcast(*x);
            for (int part = 0; part < V::kParts; ++part) {
              sum = V::multiply_add(V::operand(some, part), V::operand(all, part), sum);
            }
          }
        }
        float* edge = edge_.data() + row * 2 * blocks(s_) * kBlock + at;
        V::store_floats(edge, sum);  // its lanes beyond the block are overwritten by the next one
        for (int64_t i = 0; i < kBlock; ++i) edge[i] += s_.edge_bias[type * 2 * blocks(s_) * kBlock + at + i];
      }
    }
  }

  // The maximum of two rows and both phases, into the first row's even planes.
  void pool(uint32_t* upper) {
    uint32_t* lower = upper + row_words();
    for (int64_t k = 0; k < count_; ++k) {
      uint32_t *a = upper + 2 * k * pitch_, *b = lower + 2 * k * pitch_;
      for (int64_t x = 0; x < columns_; x += V::kLanes) {
        const auto top = V::max(V::load(a + x), V::load(a + pitch_ + x));
        const auto bottom = V::max(V::load(b + x), V::load(b + pitch_ + x));
        V::store(a + x, V::max(top, bottom));
      }
    }
  }

  // Channel c of the last 1x1 convolution, to pairs of columns from `at` on.
  void draw(const uint32_t* planes, int64_t c, int64_t at) {
    const auto* weights = static_cast<const uint32_t*>(s_.out_weight) + c * blocks(s_) * kBlock / V::kPer;
    for (int64_t x = 0; x < columns_; x += V::kLanes) {
      typename V::Floats sums[2] = {V::set(s_.out_bias[c]), V::set(s_.out_bias[c])};
      for (int64_t k = 0; k < count_; ++k) {
        const auto weight = V::broadcast(weights[k]);
        for (int phase = 0; phase < 2; ++phase) {
          const auto values = V::load(planes + (2 * k + phase) * pitch_ + x);
          for (int part = 0; part < V::kParts; ++part) {
            sums[phase] = V::multiply_add(V::operand(values, part), V::operand(weight, part), sums[phase]);
          }
        }
      }
      V::store_interleaved(static_cast<uint32_t*>(s_.image) + (at + x) * 2 / V::kPer, columns_ - x, sums);
    }
  }

  const HeadLevel& s_;
  bool decoder_;
  int64_t columns_, count_;  // of a phase; words of an output pixel
  Rows<V> fine_, coarse_;
  int64_t pitch_;
  Planes planes_;                // a group's rows of the output: (word, even and odd)
  Planes totals_;                // (output, row, vector)
  std::vector<float> edge_;      // (row, side, channel)
  std::vector<Term> terms_[2];  // by phase
};

template <class V>
void run_level(const HeadLevel& level) {
  const int64_t bytes = level.batch * (level.stop - level.start) * level.width * element_bytes(level.type);
  if (level.out != nullptr) prefer_huge_pages(level.out, bytes * level.channels);
  if (level.pooled != nullptr) prefer_huge_pages(level.pooled, bytes * level.channels / 4);
  constexpr int64_t kGroup = Worker<V>::kGroup;
  const int64_t first = level.start / kGroup, count = (level.stop + kGroup - 1) / kGroup - first;
  torch::stable::parallel_for(0, level.batch * count, 1, [&](int64_t begin, int64_t end) {
    Worker<V> worker(level);
    for (int64_t index = begin; index < end; ++index) worker.group(index / count, (first + index % count) * kGroup);
  });
}

}  // namespace
}  // namespace l2p
