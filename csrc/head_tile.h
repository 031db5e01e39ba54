// Why: the CUDA kernel of a Detailer Head level, one tile at a time, written so that the host can run it, too: all index
// arithmetic is here, and only the `Warp` that holds fragments and multiplies them differs (mma.sync on a GPU, plain loops
// on the host, where the tests run it).
//
// A tile is kTileColumns columns of the half-size picture, so 64 of the level's, and twice `rows` of its rows. Threads copy
// the window of either input to shared memory (the fine one with even and odd columns apart), each warp then makes two rows
// of the output, 2 x 2 phases of 32 columns, 16 channels at a time: for every tap and 16 input channels an m16n8k16 product
// of 16 columns. The outputs meet in shared memory, from where they are stored, pooled, or mapped to the picture.
#pragma once

#include <cmath>
#include <cstring>

#include "head.h"

namespace l2p {

// Fragments stay in registers only where no loop over them is left.
#if defined(__CUDACC__)
#define L2P_UNROLL _Pragma("unroll")
#else
#define L2P_UNROLL
#endif

constexpr int kTileColumns = 32;
constexpr int kLevelColumns = 2 * kTileColumns;
constexpr int kColumnSteps = kTileColumns / 16;
constexpr int kFineColumns = kTileColumns + 1;    // of either parity, with the one beyond the tile
constexpr int kCoarseColumns = kTileColumns + 2;  // one beyond on either side
constexpr int kBlocksAtOnce = 2;
constexpr int kMaxTileRows = 4;
constexpr int kSharedBytes = 96 * 1024;  // what every architecture from sm_80 on has for one block
constexpr int kNothing = -1;

// Fragments of mma.m16n8k16 with 16-bit inputs, as PTX lays them out over the lanes: a register of A holds two
// neighbouring inputs (a pair) of one column, of B two inputs of one output, of C one output of one column.
L2P_HOST_DEVICE inline int a_column(int lane, int reg) { return lane / 4 + reg % 2 * 8; }
L2P_HOST_DEVICE inline int a_pair(int lane, int reg) { return lane % 4 + reg / 2 * 4; }
L2P_HOST_DEVICE inline int b_pair(int lane, int reg) { return lane % 4 + reg * 4; }
L2P_HOST_DEVICE inline int b_output(int lane) { return lane / 4; }
L2P_HOST_DEVICE inline int c_column(int lane, int reg) { return lane / 4 + reg / 2 * 8; }
L2P_HOST_DEVICE inline int c_output(int lane, int reg) { return lane % 4 * 2 + reg % 2; }

L2P_HOST_DEVICE inline uint32_t bf16_bits(float value) {
#if defined(__CUDA_ARCH__)
  uint32_t bits = __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
#endif
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
}

L2P_HOST_DEVICE inline float bf16_value(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits << 16);
#else
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

L2P_HOST_DEVICE inline float low_value(uint32_t word) { return bf16_value(word & 0xffffu); }
L2P_HOST_DEVICE inline float high_value(uint32_t word) { return bf16_value(word >> 16); }

L2P_HOST_DEVICE inline float silu_of(float x) { return x / (1.0f + expf(-x)); }

// Where things lie in a tile's shared memory, in words. A pitch of 4 modulo 8 words between neighbouring columns lets a
// fragment be read without bank conflicts, as does 2 modulo 4 in the output, which is written every other column.
struct TileLayout {
  int rows;  // of the half-size picture
  int fine_pitch, coarse_pitch, out_pitch;
  int fine_steps, coarse_steps;  // of 8 pairs
  int coarse_at, out_at, offsets_at, words;
};

L2P_HOST_DEVICE inline int input_pitch(int64_t pairs) {
  return static_cast<int>(pairs) + (12 - static_cast<int>(pairs % 8)) % 8;
}
L2P_HOST_DEVICE inline int steps_of(int64_t pairs) { return static_cast<int>((kTaps * pairs + 7) / 8); }

L2P_HOST_DEVICE inline TileLayout tile_layout(const HeadLevel& s, int rows) {
  TileLayout l{};
  const bool decoder = s.coarse.channels > 0;
  l.rows = rows;
  l.fine_pitch = input_pitch(pairs(s.fine));
  l.coarse_pitch = decoder ? input_pitch(pairs(s.coarse)) : 0;
  l.out_pitch = static_cast<int>(blocks(s)) * 4 + 2;
  l.fine_steps = steps_of(pairs(s.fine));
  l.coarse_steps = decoder ? steps_of(pairs(s.coarse)) : 0;
  l.coarse_at = (2 * rows + 2) * 2 * kFineColumns * l.fine_pitch;
  l.out_at = l.coarse_at + (rows + 2) * kCoarseColumns * l.coarse_pitch;
  l.offsets_at = l.out_at + 2 * rows * kLevelColumns * l.out_pitch;
  l.words = l.offsets_at + 8 * (2 * l.fine_steps + l.coarse_steps);
  return l;
}

// As many rows as fit, at most kMaxTileRows; 0: the level has too many channels.
inline int tile_rows(const HeadLevel& s) {
  for (int rows = kMaxTileRows; rows > 0; rows /= 2) {
    if (tile_layout(s, rows).words * 4 <= kSharedBytes) return rows;
  }
  return 0;
}

// The tiles of a band: numbered over (sample, row, column), column fastest.
struct Tile {
  int64_t sample;
  int64_t row, column;  // of the half-size picture
};

L2P_HOST_DEVICE inline int64_t tiles_across(const HeadLevel& s) { return (s.width / 2 + kTileColumns - 1) / kTileColumns; }
L2P_HOST_DEVICE inline int64_t tiles_down(const HeadLevel& s, int rows) {
  return ((s.stop + 1) / 2 - s.start / 2 + rows - 1) / rows;
}
inline int64_t tile_count(const HeadLevel& s, int rows) { return s.batch * tiles_down(s, rows) * tiles_across(s); }
L2P_HOST_DEVICE inline Tile tile_at(const HeadLevel& s, int rows, int64_t index) {
  const int64_t column = index % tiles_across(s), line = index / tiles_across(s);
  return {line / tiles_down(s, rows), s.start / 2 + line % tiles_down(s, rows) * rows, column * kTileColumns};
}

// Word offset, from a tile column's own place, of pair q % pairs of tap q / pairs; kNothing beyond the last tap.
L2P_HOST_DEVICE inline int fine_offset(const TileLayout& l, int count, int phase, int q) {
  if (q >= kTaps * count) return kNothing;
  const int tap = q / count, x = phase + tap % 3 - 1;  // -1 .. 2 from the even column
  const int odd = x & 1, column = (x >> 1) + odd;      // odd columns are held from -1 on
  return ((tap / 3 * 2 + odd) * kFineColumns + column) * l.fine_pitch + q % count;
}
L2P_HOST_DEVICE inline int coarse_offset(const TileLayout& l, int count, int q) {
  if (q >= kTaps * count) return kNothing;
  const int tap = q / count;
  return (tap / 3 * kCoarseColumns + tap % 3) * l.coarse_pitch + q % count;
}

// Pair k of the pixel (y, x); zero outside a picture of height x width.
L2P_HOST_DEVICE inline uint32_t pair_at(const Band& band, int64_t sample, int64_t y, int64_t x, int64_t k,
                                        int64_t height, int64_t width) {
  if (y < 0 || y >= height || x < 0 || x >= width) return 0;
  const int64_t at = sample * band.stride[0] + (y - band.start) * band.stride[1] + x * band.stride[2] +
                     2 * k * band.stride[3];
  const bool both = 2 * k + 1 < band.channels;
  if (band.type == Element::f32) {
    const float* values = static_cast<const float*>(band.data);
    return bf16_bits(values[at]) | (both ? bf16_bits(values[at + band.stride[3]]) << 16 : 0);
  }
  const uint16_t* values = static_cast<const uint16_t*>(band.data);
  return values[at] | (both ? static_cast<uint32_t>(values[at + band.stride[3]]) << 16 : 0);
}

// First part of a tile, by all threads: inputs and offsets to shared memory. Rows that the band lacks, since no wanted row
// needs them, become zero.
L2P_HOST_DEVICE inline void load_tile(const HeadLevel& s, const TileLayout& l, const Tile& tile, uint32_t* shared,
                                      int thread, int threads) {
  const int fine = static_cast<int>(pairs(s.fine)), coarse = static_cast<int>(pairs(s.coarse));
  for (int i = thread; i < (2 * l.rows + 2) * 2 * kFineColumns * fine; i += threads) {
    const int k = i % fine, place = i / fine, column = place % kFineColumns, line = place / kFineColumns;
    const int odd = line % 2;
    const int64_t y = 2 * tile.row - 1 + line / 2, x = 2 * (tile.column + column - odd) + odd;
    const bool wanted = y >= s.start - 1 && y <= s.stop;
    shared[place * l.fine_pitch + k] = wanted ? pair_at(s.fine, tile.sample, y, x, k, s.height, s.width) : 0;
  }
  for (int i = thread; i < (l.coarse_steps > 0 ? (l.rows + 2) * kCoarseColumns * coarse : 0); i += threads) {
    const int k = i % coarse, place = i / coarse, column = place % kCoarseColumns, line = place / kCoarseColumns;
    const int64_t y = tile.row - 1 + line, x = tile.column - 1 + column;
    const bool wanted = y >= s.start / 2 - 1 && y <= (s.stop + 1) / 2;
    shared[l.coarse_at + place * l.coarse_pitch + k] =
        wanted ? pair_at(s.coarse, tile.sample, y, x, k, s.height / 2, s.width / 2) : 0;
  }
  for (int i = thread; i < 8 * (2 * l.fine_steps + l.coarse_steps); i += threads) {
    const int of_phase = 8 * l.fine_steps;
    const int offset = i < 2 * of_phase ? fine_offset(l, fine, i / of_phase, i % of_phase)
                                        : coarse_offset(l, coarse, i - 2 * of_phase);
    shared[l.offsets_at + i] = static_cast<uint32_t>(offset);
  }
}

// A fragment of 16 columns from `at` on, `pitch` words apart; `offsets` are those of the step's 8 pairs. `only`: the one
// column that counts, or kNothing for all.
template <typename Warp>
L2P_HOST_DEVICE inline void load_a(typename Warp::A& a, const uint32_t* at, int pitch, const uint32_t* offsets,
                                   int only = kNothing) {
  Warp::lanes([&](int lane) {
    L2P_UNROLL
    for (int reg = 0; reg < 4; ++reg) {
      const int offset = static_cast<int>(offsets[a_pair(lane, reg)]), column = a_column(lane, reg);
      const bool counts = offset != kNothing && (only == kNothing || only == column);
      Warp::of(a, lane)[reg] = counts ? at[column * pitch + offset] : 0;
    }
  });
}

// A fragment of 8 outputs: `weights` of a block from the step's first pair on, `left` pairs of which exist.
template <typename Warp>
L2P_HOST_DEVICE inline void load_b(typename Warp::B& b, const uint32_t* weights, int left) {
  Warp::lanes([&](int lane) {
    L2P_UNROLL
    for (int reg = 0; reg < 2; ++reg) {
      const int pair = b_pair(lane, reg);
      Warp::of(b, lane)[reg] = pair < left ? Warp::read(weights + pair * kBlock + b_output(lane)) : 0;
    }
  });
}

// Second part, by each warp: two rows of the level, from bias to SiLU, into shared memory.
template <typename Warp>
L2P_HOST_DEVICE inline void compute_rows(const HeadLevel& s, const TileLayout& l, const Tile& tile, uint32_t* shared,
                                         int warp) {
  const bool decoder = l.coarse_steps > 0;
  const int fine = static_cast<int>(pairs(s.fine)), coarse = static_cast<int>(pairs(s.coarse));
  const int64_t y = 2 * (tile.row + warp);
  const int64_t types[2] = {decoder ? row_type(s, y) : 0, decoder ? row_type(s, y + 1) : 0};
  const uint32_t* offsets = shared + l.offsets_at;
  const uint32_t* coarse_offsets = offsets + 2 * 8 * l.fine_steps;
  const uint32_t* coarse_row = shared + l.coarse_at + warp * kCoarseColumns * l.coarse_pitch;
  // The picture's first and last column, as columns of this tile.
  const int64_t edges[2] = {-tile.column, s.width / 2 - 1 - tile.column};

  for (int64_t first = 0; first < blocks(s); first += kBlocksAtOnce) {
    const int count = static_cast<int>(blocks(s) - first < kBlocksAtOnce ? blocks(s) - first : kBlocksAtOnce);
    typename Warp::C sums[2][2][kColumnSteps][kBlocksAtOnce];  // row, phase
    L2P_UNROLL
    for (auto& row : sums) {
      L2P_UNROLL
      for (auto& phase : row) {
        L2P_UNROLL
        for (auto& step : phase) {
          L2P_UNROLL
          for (auto& block : step) Warp::clear(block);
        }
      }
    }
    for (int step = 0; step < l.fine_steps; ++step) {
      typename Warp::B b[kBlocksAtOnce];
      L2P_UNROLL
      for (int n = 0; n < kBlocksAtOnce; ++n) {
        const int64_t at = fine_weights_at(s, first + n) + step * 8 * kBlock;
        load_b<Warp>(b[n], s.fine_weight + at, n < count ? kTaps * fine - 8 * step : 0);
      }
      L2P_UNROLL
      for (int row = 0; row < 2; ++row) {
        L2P_UNROLL
        for (int phase = 0; phase < 2; ++phase) {
          L2P_UNROLL
          for (int m = 0; m < kColumnSteps; ++m) {
            typename Warp::A a;
            load_a<Warp>(a, shared + ((2 * warp + row) * 2 * kFineColumns + m * 16) * l.fine_pitch, l.fine_pitch,
                         offsets + 8 * (phase * l.fine_steps + step));
            L2P_UNROLL
            for (int n = 0; n < kBlocksAtOnce; ++n) Warp::multiply(sums[row][phase][m][n], a, b[n]);
          }
        }
      }
    }
    for (int step = 0; step < l.coarse_steps; ++step) {
      typename Warp::A a[kColumnSteps];
      L2P_UNROLL
      for (int m = 0; m < kColumnSteps; ++m) {
        load_a<Warp>(a[m], coarse_row + m * 16 * l.coarse_pitch, l.coarse_pitch, coarse_offsets + 8 * step);
      }
      L2P_UNROLL
      for (int row = 0; row < 2; ++row) {
        L2P_UNROLL
        for (int phase = 0; phase < 2; ++phase) {
          L2P_UNROLL
          for (int n = 0; n < kBlocksAtOnce; ++n) {
            typename Warp::B b;
            const int64_t at = coarse_weights_at(s, types[row], phase, first + n) + step * 8 * kBlock;
            load_b<Warp>(b, s.coarse_weight + at, n < count ? kTaps * coarse - 8 * step : 0);
            L2P_UNROLL
            for (int m = 0; m < kColumnSteps; ++m) Warp::multiply(sums[row][phase][m][n], a[m], b);
          }
        }
      }
    }
    // The first column is even, the last odd: side and phase are one. What they add reads the middle tap column alone.
    L2P_UNROLL
    for (int side = 0; side < 2; ++side) {
      if (!decoder || edges[side] < 0 || edges[side] >= kTileColumns) continue;
      const int m = static_cast<int>(edges[side] / 16), only = static_cast<int>(edges[side] % 16);
      for (int step = 0; 8 * step < 3 * coarse; ++step) {
        uint32_t middle[8];
        for (int q = 0; q < 8; ++q) {
          const int pair = 8 * step + q;
          const int tap = pair / coarse * 3 + 1;
          middle[q] = static_cast<uint32_t>(
              pair < 3 * coarse ? coarse_offset(l, coarse, tap * coarse + pair % coarse) : kNothing);
        }
        typename Warp::A a;
        load_a<Warp>(a, coarse_row + m * 16 * l.coarse_pitch, l.coarse_pitch, middle, only);
        L2P_UNROLL
        for (int row = 0; row < 2; ++row) {
          L2P_UNROLL
          for (int n = 0; n < kBlocksAtOnce; ++n) {
            typename Warp::B b;
            const int64_t at = edge_weights_at(s, types[row], side, first + n) + step * 8 * kBlock;
            load_b<Warp>(b, s.edge_weight + at, n < count ? 3 * coarse - 8 * step : 0);
            L2P_UNROLL
            for (int step_m = 0; step_m < kColumnSteps; ++step_m) {
              if (step_m == m) Warp::multiply(sums[row][side][step_m][n], a, b);
            }
          }
        }
      }
    }
    L2P_UNROLL
    for (int row = 0; row < 2; ++row) {
      L2P_UNROLL
      for (int phase = 0; phase < 2; ++phase) {
        L2P_UNROLL
        for (int m = 0; m < kColumnSteps; ++m) {
          L2P_UNROLL
          for (int n = 0; n < kBlocksAtOnce; ++n) {
            if (n >= count) continue;
            Warp::lanes([&](int lane) {
              L2P_UNROLL
              for (int reg = 0; reg < 4; reg += 2) {  // two registers are a pair of outputs
                const int column = m * 16 + c_column(lane, reg);
                const int64_t output = (first + n) * kBlock + c_output(lane, reg);
                const int64_t bias = types[row] * blocks(s) * kBlock + output;
                const int64_t edge_bias = (types[row] * 2 + phase) * blocks(s) * kBlock + output;
                uint32_t word = 0;
                L2P_UNROLL
                for (int half = 0; half < 2; ++half) {
                  float value = Warp::of(sums[row][phase][m][n], lane)[reg + half] + s.bias[bias + half];
                  if (decoder && column == edges[phase]) value += s.edge_bias[edge_bias + half];
                  word |= bf16_bits(silu_of(value)) << (16 * half);
                }
                const int place = (2 * warp + row) * kLevelColumns + 2 * column + phase;
                shared[l.out_at + place * l.out_pitch + output / 2] = word;
              }
            });
          }
        }
      }
    }
  }
}

L2P_HOST_DEVICE inline uint32_t larger_pair(uint32_t a, uint32_t b) {
  const uint32_t low = low_value(a) > low_value(b) ? a : b, high = high_value(a) > high_value(b) ? a : b;
  return (low & 0xffffu) | (high & 0xffff0000u);
}

// Third part, by all threads: from shared memory to the results.
L2P_HOST_DEVICE inline void store_tile(const HeadLevel& s, const TileLayout& l, const Tile& tile,
                                       const uint32_t* shared, int thread, int threads) {
  const int count = static_cast<int>(s.channels / 2);
  const int64_t rows = s.stop - s.start, y0 = 2 * tile.row, x0 = 2 * tile.column;
  const uint32_t* out = shared + l.out_at;
  for (int i = thread; s.out != nullptr && i < 2 * l.rows * kLevelColumns * count; i += threads) {
    const int k = i % count, place = i / count;
    const int64_t y = y0 + place / kLevelColumns, x = x0 + place % kLevelColumns;
    if (y < s.start || y >= s.stop || x >= s.width) continue;
    const int64_t pixel = (tile.sample * rows + y - s.start) * s.width + x;
    reinterpret_cast<uint32_t*>(s.out)[pixel * count + k] = out[place * l.out_pitch + k];
  }
  for (int i = thread; s.pooled != nullptr && i < l.rows * kTileColumns * count; i += threads) {
    const int k = i % count, column = i / count % kTileColumns, row = i / count / kTileColumns;
    const int64_t y = tile.row + row, x = tile.column + column;
    if (2 * y < s.start || 2 * y >= s.stop || 2 * x >= s.width) continue;
    const uint32_t* upper = out + (2 * row * kLevelColumns + 2 * column) * l.out_pitch + k;
    const uint32_t* lower = upper + kLevelColumns * l.out_pitch;
    const int64_t pixel = (tile.sample * (rows / 2) + y - s.start / 2) * (s.width / 2) + x;
    reinterpret_cast<uint32_t*>(s.pooled)[pixel * count + k] =
        larger_pair(larger_pair(upper[0], upper[l.out_pitch]), larger_pair(lower[0], lower[l.out_pitch]));
  }
  for (int i = thread; s.picture != nullptr && i < 3 * 2 * l.rows * kLevelColumns; i += threads) {
    const int place = i % (2 * l.rows * kLevelColumns), c = i / (2 * l.rows * kLevelColumns);
    const int64_t y = y0 + place / kLevelColumns, x = x0 + place % kLevelColumns;
    if (y < s.start || y >= s.stop || x >= s.width) continue;
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(s.out_weight) + c * blocks(s) * kBlock / 2;
    float sum = s.out_bias[c];
    for (int k = 0; k < count; ++k) {
      const uint32_t word = out[place * l.out_pitch + k];
      sum += low_value(word) * low_value(weights[k]) + high_value(word) * high_value(weights[k]);
    }
    static_cast<uint16_t*>(s.picture)[((tile.sample * 3 + c) * rows + y - s.start) * s.width + x] = static_cast<uint16_t>(bf16_bits(sum));
  }
}

// The tiles one after the other on the host. Null, or why the level can't be run so.
const char* head_level_tiles(const HeadLevel&);

// Launches on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* head_level_cuda(const HeadLevel&, void* stream);

}  // namespace l2p
