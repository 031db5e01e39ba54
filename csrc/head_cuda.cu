// One level of the Detailer Head on tensor cores, a tile a block.
//
// A tile is kTileColumns columns of the half-size picture, so 64 of the level's, and twice `rows` of its rows. Threads copy
// the window of either input to shared memory (the fine one with even and odd columns apart), each warp then makes two rows
// of the output, 2 x 2 phases of 32 columns, 16 channels at a time: for every tap and 16 input channels an m16n8k16 product
// of 16 columns. Weights are read through the L1 cache, where all warps of a block meet; the sums stay in registers over
// all taps. The outputs meet in shared memory, from where they are stored, pooled, or mapped to the picture.
#include "cuda.cuh"
#include "head.h"
#include "index.h"
#include "ptx.cuh"

namespace l2p {
namespace {

constexpr int kTileColumns = 32;
constexpr int kLevelColumns = 2 * kTileColumns;
constexpr int kColumnSteps = kTileColumns / 16;
constexpr int kFineColumns = kTileColumns + 1;    // of either parity, with the one beyond the tile
constexpr int kCoarseColumns = kTileColumns + 2;  // one beyond on either side
constexpr int kBlocksAtOnce = 2;
constexpr int kMaxTileRows = 4;
constexpr int kNothing = -1;

// Fragments of mma.m16n8k16 with 16-bit inputs, as PTX lays them out over the lanes: a register of A holds two
// neighbouring inputs (a pair) of one column, of B two inputs of one output, of C one output of one column.
__device__ int a_column(int lane, int reg) { return lane / 4 + reg % 2 * 8; }
__device__ int a_pair(int lane, int reg) { return lane % 4 + reg / 2 * 4; }
__device__ int b_pair(int lane, int reg) { return lane % 4 + reg * 4; }
__device__ int b_output(int lane) { return lane / 4; }
__device__ int c_column(int lane, int reg) { return lane / 4 + reg / 2 * 8; }
__device__ int c_output(int lane, int reg) { return lane % 4 * 2 + reg % 2; }

// Two values as a pair of bfloat16, and back.
__device__ uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

__device__ float2 values_of(uint32_t word) {
  __nv_bfloat162 pair;
  memcpy(&pair, &word, sizeof word);
  return __bfloat1622float2(pair);
}

// NaN where one of the two is, as PyTorch's pool.
__device__ uint32_t larger_pair(uint32_t a, uint32_t b) {
  __nv_bfloat162 pairs[2];
  memcpy(&pairs[0], &a, sizeof a);
  memcpy(&pairs[1], &b, sizeof b);
  const __nv_bfloat162 larger = __hmax2_nan(pairs[0], pairs[1]);
  memcpy(&a, &larger, sizeof a);
  return a;
}

__device__ float silu_of(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Where things lie in a tile's shared memory, in words. A pitch of 4 modulo 8 words between neighbouring columns lets a
// fragment be read without bank conflicts, as does 2 modulo 4 in the output, which is written every other column.
struct TileLayout {
  int rows;  // of the half-size picture
  int fine_pitch, coarse_pitch, out_pitch;
  int fine_steps, coarse_steps;  // of 8 pairs
  int coarse_at, out_at, offsets_at, words;
};

int input_pitch(int64_t pairs) {
  return static_cast<int>(pairs) + (12 - static_cast<int>(pairs % 8)) % 8;
}
int steps_of(int64_t pairs) { return static_cast<int>((kTaps * pairs + 7) / 8); }

TileLayout tile_layout(const HeadLevel& s, int rows) {
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
int tile_rows(const HeadLevel& s) {
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

L2P_HOST_DEVICE int64_t tiles_across(const HeadLevel& s) { return (s.width / 2 + kTileColumns - 1) / kTileColumns; }
L2P_HOST_DEVICE int64_t tiles_down(const HeadLevel& s, int rows) {
  return ((s.stop + 1) / 2 - s.start / 2 + rows - 1) / rows;
}
int64_t tile_count(const HeadLevel& s, int rows) { return s.batch * tiles_down(s, rows) * tiles_across(s); }
__device__ Tile tile_at(const HeadLevel& s, int rows, int64_t index) {
  const Divided column = divided(index, tiles_across(s)), line = divided(column.quotient, tiles_down(s, rows));
  return {line.quotient, s.start / 2 + line.remainder * rows, column.remainder * kTileColumns};
}

// Word offset, from a tile column's own place, of pair q % pairs of tap q / pairs; kNothing beyond the last tap.
__device__ int fine_offset(const TileLayout& l, int count, int phase, int q) {
  if (q >= kTaps * count) return kNothing;
  const int tap = q / count, x = phase + tap % 3 - 1;  // -1 .. 2 from the even column
  const int odd = x & 1, column = (x >> 1) + odd;      // odd columns are held from -1 on
  return ((tap / 3 * 2 + odd) * kFineColumns + column) * l.fine_pitch + q % count;
}
__device__ int coarse_offset(const TileLayout& l, int count, int q) {
  if (q >= kTaps * count) return kNothing;
  const int tap = q / count;
  return (tap / 3 * kCoarseColumns + tap % 3) * l.coarse_pitch + q % count;
}

// Pair k of the pixel (y, x); zero outside a picture of height x width.
__device__ uint32_t pair_at(const Band& band, int64_t sample, int64_t y, int64_t x, int64_t k, int64_t height,
                            int64_t width) {
  if (y < 0 || y >= height || x < 0 || x >= width) return 0;
  const int64_t at = sample * band.stride[0] + (y - band.start) * band.stride[1] + x * band.stride[2] +
                     2 * k * band.stride[3];
  const bool both = 2 * k + 1 < band.channels;
  if (band.type == Element::f32) {
    const float* values = static_cast<const float*>(band.data);
    return pair_of(values[at], both ? values[at + band.stride[3]] : 0.0f);
  }
  const uint16_t* values = static_cast<const uint16_t*>(band.data);
  return values[at] | (both ? static_cast<uint32_t>(values[at + band.stride[3]]) << 16 : 0);
}

// First part of a tile, by all threads: inputs and offsets to shared memory. Rows that the band lacks, since no wanted row
// needs them, become zero.
__device__ void load_tile(const HeadLevel& s, const TileLayout& l, const Tile& tile, uint32_t* shared, int thread,
                          int threads) {
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

// A fragment of 16 columns from `at` on, `pitch` words apart; `offset_of` gives those of the step's 8 pairs. `only`: the
// one column that counts, or kNothing for all.
template <typename Offset>
__device__ void load_a(uint32_t (&a)[4], const uint32_t* at, int pitch, int lane, const Offset& offset_of,
                       int only = kNothing) {
#pragma unroll
  for (int reg = 0; reg < 4; ++reg) {
    const int offset = offset_of(a_pair(lane, reg)), column = a_column(lane, reg);
    const bool counts = offset != kNothing && (only == kNothing || only == column);
    a[reg] = counts ? at[column * pitch + offset] : 0;
  }
}

// A fragment of 8 outputs: `weights` of a block from the step's first pair on, `left` pairs of which exist.
__device__ void load_b(uint32_t (&b)[2], const uint32_t* weights, int left, int lane) {
#pragma unroll
  for (int reg = 0; reg < 2; ++reg) {
    const int pair = b_pair(lane, reg);
    b[reg] = pair < left ? __ldg(weights + pair * kBlock + b_output(lane)) : 0;
  }
}

// Second part, by each warp: two rows of the level, from bias to SiLU, into shared memory.
__device__ void compute_rows(const HeadLevel& s, const TileLayout& l, const Tile& tile, uint32_t* shared, int warp,
                             int lane) {
  const bool decoder = l.coarse_steps > 0;
  const int fine = static_cast<int>(pairs(s.fine)), coarse = static_cast<int>(pairs(s.coarse));
  const int64_t y = 2 * (tile.row + warp);
  const int64_t types[2] = {decoder ? row_type(s, y) : 0, decoder ? row_type(s, y + 1) : 0};
  const int* offsets = reinterpret_cast<const int*>(shared + l.offsets_at);
  const int* coarse_offsets = offsets + 2 * 8 * l.fine_steps;
  const uint32_t* coarse_row = shared + l.coarse_at + warp * kCoarseColumns * l.coarse_pitch;
  // The picture's first and last column, as columns of this tile.
  const int64_t edges[2] = {-tile.column, s.width / 2 - 1 - tile.column};

  for (int64_t first = 0; first < blocks(s); first += kBlocksAtOnce) {
    const int count = static_cast<int>(blocks(s) - first < kBlocksAtOnce ? blocks(s) - first : kBlocksAtOnce);
    float sums[2][2][kColumnSteps][kBlocksAtOnce][4] = {};  // row, phase
    for (int step = 0; step < l.fine_steps; ++step) {
      uint32_t b[kBlocksAtOnce][2];
#pragma unroll
      for (int n = 0; n < kBlocksAtOnce; ++n) {
        const int64_t at = (first + n) * kTaps * fine * kBlock + step * 8 * kBlock;
        load_b(b[n], s.fine_weight + at, n < count ? kTaps * fine - 8 * step : 0, lane);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int phase = 0; phase < 2; ++phase) {
#pragma unroll
          for (int m = 0; m < kColumnSteps; ++m) {
            uint32_t a[4];
            load_a(a, shared + ((2 * warp + row) * 2 * kFineColumns + m * 16) * l.fine_pitch, l.fine_pitch, lane,
                   [&](int pair) { return offsets[8 * (phase * l.fine_steps + step) + pair]; });
#pragma unroll
            for (int n = 0; n < kBlocksAtOnce; ++n) multiply(sums[row][phase][m][n], a, b[n]);
          }
        }
      }
    }
    for (int step = 0; step < l.coarse_steps; ++step) {
      uint32_t a[kColumnSteps][4];
#pragma unroll
      for (int m = 0; m < kColumnSteps; ++m) {
        load_a(a[m], coarse_row + m * 16 * l.coarse_pitch, l.coarse_pitch, lane,
               [&](int pair) { return coarse_offsets[8 * step + pair]; });
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int phase = 0; phase < 2; ++phase) {
#pragma unroll
          for (int n = 0; n < kBlocksAtOnce; ++n) {
            uint32_t b[2];
            const int64_t at =
                ((types[row] * 2 + phase) * blocks(s) + first + n) * kTaps * coarse * kBlock + step * 8 * kBlock;
            load_b(b, s.coarse_weight + at, n < count ? kTaps * coarse - 8 * step : 0, lane);
#pragma unroll
            for (int m = 0; m < kColumnSteps; ++m) multiply(sums[row][phase][m][n], a[m], b);
          }
        }
      }
    }
    // The first column is even, the last odd: side and phase are one. What they add reads the middle tap column alone.
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (!decoder || edges[side] < 0 || edges[side] >= kTileColumns) continue;
      const int m = static_cast<int>(edges[side] / 16), only = static_cast<int>(edges[side] % 16);
      for (int step = 0; 8 * step < 3 * coarse; ++step) {
        uint32_t a[4];
        const auto middle = [&](int pair) {
          const int q = 8 * step + pair, tap = q / coarse * 3 + 1;
          return q < 3 * coarse ? coarse_offset(l, coarse, tap * coarse + q % coarse) : kNothing;
        };
        load_a(a, coarse_row + m * 16 * l.coarse_pitch, l.coarse_pitch, lane, middle, only);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
          for (int n = 0; n < kBlocksAtOnce; ++n) {
            uint32_t b[2];
            const int64_t at =
                ((types[row] * 2 + side) * blocks(s) + first + n) * 3 * coarse * kBlock + step * 8 * kBlock;
            load_b(b, s.edge_weight + at, n < count ? 3 * coarse - 8 * step : 0, lane);
#pragma unroll
            for (int step_m = 0; step_m < kColumnSteps; ++step_m) {
              if (step_m == m) multiply(sums[row][side][step_m][n], a, b);
            }
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int phase = 0; phase < 2; ++phase) {
#pragma unroll
        for (int m = 0; m < kColumnSteps; ++m) {
#pragma unroll
          for (int n = 0; n < kBlocksAtOnce; ++n) {
            if (n >= count) continue;
#pragma unroll
            for (int reg = 0; reg < 4; reg += 2) {  // two registers are a pair of outputs
              const int column = m * 16 + c_column(lane, reg);
              const int64_t output = (first + n) * kBlock + c_output(lane, reg);
              const int64_t bias = types[row] * blocks(s) * kBlock + output;
              const int64_t edge_bias = (types[row] * 2 + phase) * blocks(s) * kBlock + output;
              float values[2];
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                values[half] = sums[row][phase][m][n][reg + half] + s.bias[bias + half];
                if (decoder && column == edges[phase]) values[half] += s.edge_bias[edge_bias + half];
              }
              const int place = (2 * warp + row) * kLevelColumns + 2 * column + phase;
              shared[l.out_at + place * l.out_pitch + output / 2] = pair_of(silu_of(values[0]), silu_of(values[1]));
            }
          }
        }
      }
    }
  }
}

// Third part, by all threads: from shared memory to the results.
__device__ void store_tile(const HeadLevel& s, const TileLayout& l, const Tile& tile, const uint32_t* shared, int thread,
                           int threads) {
  const int count = static_cast<int>(s.channels / 2);
  const int64_t rows = s.stop - s.start, y0 = 2 * tile.row, x0 = 2 * tile.column;
  const uint32_t* out = shared + l.out_at;
  for (int i = thread; s.out != nullptr && i < 2 * l.rows * kLevelColumns * count; i += threads) {
    const int k = i % count, place = i / count;
    const int64_t y = y0 + place / kLevelColumns, x = x0 + place % kLevelColumns;
    if (y < s.start || y >= s.stop || x >= s.width) continue;
    const int64_t pixel = (tile.sample * rows + y - s.start) * s.width + x;
    static_cast<uint32_t*>(s.out)[pixel * count + k] = out[place * l.out_pitch + k];
  }
  for (int i = thread; s.pooled != nullptr && i < l.rows * kTileColumns * count; i += threads) {
    const int k = i % count, column = i / count % kTileColumns, row = i / count / kTileColumns;
    const int64_t y = tile.row + row, x = tile.column + column;
    if (2 * y < s.start || 2 * y >= s.stop || 2 * x >= s.width) continue;
    const uint32_t* upper = out + (2 * row * kLevelColumns + 2 * column) * l.out_pitch + k;
    const uint32_t* lower = upper + kLevelColumns * l.out_pitch;
    const int64_t pixel = (tile.sample * (rows / 2) + y - s.start / 2) * (s.width / 2) + x;
    static_cast<uint32_t*>(s.pooled)[pixel * count + k] =
        larger_pair(larger_pair(upper[0], upper[l.out_pitch]), larger_pair(lower[0], lower[l.out_pitch]));
  }
  for (int i = thread; s.picture != nullptr && i < 3 * 2 * l.rows * kLevelColumns; i += threads) {
    const int place = i % (2 * l.rows * kLevelColumns), c = i / (2 * l.rows * kLevelColumns);
    const int64_t y = y0 + place / kLevelColumns, x = x0 + place % kLevelColumns;
    if (y < s.start || y >= s.stop || x >= s.width) continue;
    const uint32_t* weights = static_cast<const uint32_t*>(s.out_weight) + c * blocks(s) * kBlock / 2;
    float sum = s.out_bias[c];
    for (int k = 0; k < count; ++k) {
      const float2 value = values_of(out[place * l.out_pitch + k]), weight = values_of(weights[k]);
      sum += value.x * weight.x + value.y * weight.y;
    }
    const int64_t pixel = ((tile.sample * 3 + c) * rows + y - s.start) * s.width + x;
    static_cast<uint16_t*>(s.picture)[pixel] = static_cast<uint16_t>(pair_of(sum, 0.0f));
  }
}

__global__ void __launch_bounds__(kMaxTileRows * 32) head_kernel(HeadLevel level, TileLayout layout) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const Tile tile = tile_at(level, layout.rows, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  load_tile(level, layout, tile, shared, thread, threads);
  __syncthreads();
  compute_rows(level, layout, tile, shared, thread / 32, thread % 32);
  __syncthreads();
  store_tile(level, layout, tile, shared, thread, threads);
}

}  // namespace

const char* head_level_cuda(const HeadLevel& level, void* stream) {
  if (level.type != Element::bf16) return "the kernel takes bfloat16";
  const int rows = tile_rows(level);
  if (rows == 0) return "the level has more channels than shared memory holds";
  const TileLayout layout = tile_layout(level, rows);
  const int64_t tiles = tile_count(level, rows);
  if (const char* problem = too_many(tiles)) return problem;
  return launch(head_kernel, static_cast<unsigned>(tiles), rows * 32, layout.words * 4, stream, level, layout);
}

}  // namespace l2p
