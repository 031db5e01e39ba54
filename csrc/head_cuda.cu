// One level of the Detailer Head on tensor cores, by blocks that stay and take tile after tile.
//
// A tile is 16 x 32 outputs (8 x 16 of the half-size image) of up to 16 channels; a level of more channels is several
// blocks' work. It is summed up stage by stage: a stage is 16 channels of one input, whose window comes to shared memory
// in the background while the stage before is multiplied. All weights of a block lie in shared memory from the start,
// sorted for ldmatrix; where they don't fit, each stage brings its own.
//
// A warp makes 4 rows of the tile. One fragment of 16 columns, loaded by one ldmatrix, meets all weights that it is
// multiplied with: three tap rows times 8 or 16 outputs, of a half-size input times four phases, too. Even and odd
// columns lie apart, so that a fragment of the level's own size has one phase. Sums stay in registers until they are
// stored, pooled, or mapped to the image.
//
// The image's first and last row and column have decoder weights of their own. What these add is summed up apart, by
// those few warps that see an edge.
#include "activation.cuh"
#include "cuda.cuh"
#include "head.h"
#include "index.h"
#include "ptx.cuh"

namespace l2p {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileColumns = 16;  // of the half-size image
constexpr int kTileRows = 2 * kWarps;
constexpr int kRows = 4;   // of the level, a warp's
constexpr int kPairs = 8;  // of channels: what a product sums over

// Blocks that share a processor's registers: of decoders two, as of all on sm_120, whose shared memory holds no more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kEncoders = 2;
#else
constexpr int kEncoders = 3;
#endif
constexpr int kDecoders = 2;

// Windows in shared memory, in units of 16 bytes: 8 channels of a pixel, or of a narrow input (4 channels at most) two
// pixels. A row of the level's size is its even columns from 0 on, then its odd ones from -1 on.
constexpr int kWindowRows = 2 * kTileRows + 2;
constexpr int kFineOdd = 2 * (kTileColumns + 1);
constexpr int kFineRow = 2 * kFineOdd;
constexpr int kCoarseRow = 2 * (kTileColumns + 2);  // from column -1 on
constexpr int kNarrowRow = kTileColumns + 2;        // from column -2 on
constexpr int kFineUnits = kWindowRows * kFineRow;
constexpr int kCoarseUnits = (kTileRows + 2) * kCoarseRow;
constexpr int kNarrowUnits = kWindowRows * kNarrowRow;

// Where 8 channels of a column lie in its row: 8 columns from anywhere on, read at once, meet in no bank.
__device__ int unit_of(int column, int half) { return 2 * column + (half ^ (column >> 2 & 1)); }

// What a lane gives to ldmatrix for the fragment of 16 columns from `first` on: registers 0 and 1 get inputs 0 to 7 of
// columns 0 to 7 and 8 to 15, registers 2 and 3 the other inputs.
__device__ int lane_unit(int lane, int first) { return unit_of(lane % 16 + first, lane / 16); }

// Fragments of weights, 16 inputs by 8 outputs, are 16 units: 8 outputs with inputs 0 to 7, then with 8 to 15. ldmatrix
// loads two. In which order, `weights_of` says.
constexpr int kFragment = 16;
constexpr int even(int count) { return count + count % 2; }
constexpr int fine_fragments(int blocks, bool narrow) { return even((narrow ? 6 : 9) * blocks); }
constexpr int coarse_fragments(int blocks) { return 36 * blocks; }

enum class Reading {
  scalars,  // any strides, any type
  vectors,  // 16 bytes at once, in the background
  planes,   // pairs of float32 pixels, to a narrow window
};

struct Input {
  Reading reading;
  int chunks;  // of 16 channels
};

struct Layout {
  Input fine, coarse;
  int height, width, start, stop, blocks;  // the level's
  int across, down;                        // tiles of a sample
  int tiles;                               // numbered over (sample, row, column), column fastest
  int groups;                              // of outputs, each a block's
  bool resident;                           // all weights at once
  int weights, window;                     // units of a block's weights, of one of two windows
};

Reading reading_of(const Band& band, int64_t batch, bool narrow) {
  const int64_t rows[2] = {batch > 1 ? band.stride[0] : 0, band.stride[1]};
  const auto all = [&](int64_t of, int64_t column) { return rows[0] % of == 0 && rows[1] % of == 0 && column % of == 0; };
  const auto address = reinterpret_cast<uintptr_t>(band.data);
  if (band.type == Element::bf16 && band.stride[3] == 1 && address % 16 == 0) {
    if (narrow && band.channels == 4 && band.stride[2] == 4 && all(8, 0)) return Reading::vectors;
    if (!narrow && band.channels % 8 == 0 && all(8, band.stride[2])) return Reading::vectors;
  }
  const bool pairs = narrow && band.type == Element::f32 && band.stride[2] == 1 && address % 8 == 0;
  return pairs && all(2, band.stride[3]) ? Reading::planes : Reading::scalars;
}

bool is_narrow(const Band& band) { return band.channels <= 4; }
int chunks(const Band& band) { return static_cast<int>((band.channels + 15) / 16); }

// For blocks that make `blocks` times 8 outputs.
Layout layout_of(const HeadLevel& s, int of_blocks) {
  const bool narrow = is_narrow(s.fine);
  Layout l{};
  l.fine = {reading_of(s.fine, s.batch, narrow), narrow ? 1 : chunks(s.fine)};
  if (s.coarse.channels > 0) l.coarse = {reading_of(s.coarse, s.batch, false), chunks(s.coarse)};
  l.height = static_cast<int>(s.height), l.width = static_cast<int>(s.width);
  l.start = static_cast<int>(s.start), l.stop = static_cast<int>(s.stop);
  l.across = (l.width / 2 + kTileColumns - 1) / kTileColumns;
  l.down = ((l.stop + 1) / 2 - l.start / 2 + kTileRows - 1) / kTileRows;
  l.tiles = static_cast<int>(s.batch) * l.down * l.across;
  l.blocks = static_cast<int>(blocks(s));
  l.groups = (l.blocks + of_blocks - 1) / of_blocks;
  l.window = narrow ? kNarrowUnits : kFineUnits;
  if (l.coarse.chunks > 0 && l.window < kCoarseUnits) l.window = kCoarseUnits;
  const int fine = fine_fragments(of_blocks, narrow) * kFragment, coarse = coarse_fragments(of_blocks) * kFragment;
  l.weights = l.fine.chunks * fine + l.coarse.chunks * coarse;
  l.resident = (l.weights + 2 * l.window) * 16 <= kSharedBytes;
  if (!l.resident) l.weights = l.coarse.chunks > 0 ? coarse : fine;
  return l;
}

struct Tile {
  int sample;
  int row, column;  // of the half-size image
};

__device__ Tile tile_at(const Layout& l, int index) {
  const Divided column = divided(index, l.across), line = divided(column.quotient, l.down);
  return {static_cast<int>(line.quotient), l.start / 2 + static_cast<int>(line.remainder) * kTileRows,
          static_cast<int>(column.remainder) * kTileColumns};
}

// Two values as a pair of bfloat16.
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

// --- Windows -----------------------------------------------------------------------------------------------------------
// What a band holds of what is wanted: `rows` rows from `first` on, columns [0, width).
struct Held {
  int first, rows, width;
};

__device__ Held held_fine(const Layout& l) {
  const int first = l.start > 0 ? l.start - 1 : 0, last = l.stop < l.height ? l.stop + 1 : l.height;
  return {first, last - first, l.width};
}
__device__ Held held_coarse(const Layout& l) {
  const int start = l.start / 2, stop = (l.stop + 1) / 2;
  const int first = start > 0 ? start - 1 : 0, last = stop < l.height / 2 ? stop + 1 : l.height / 2;
  return {first, last - first, l.width / 2};
}

// Where a window begins in the band, and which channels of it are wanted.
struct Corner {
  int sample, y, x, channel;
};

__device__ int64_t offset_of(const Band& band, const Corner& c) {
  return c.sample * band.stride[0] + (c.y - band.start) * band.stride[1] + c.x * band.stride[2] +
         c.channel * band.stride[3];
}

// 8 channels from a corner on, of a narrow input 4 of it and of the next pixel; zero beyond what is there.
template <bool narrow>
__device__ uint4 unit_by_scalars(const Band& band, const Held& held, const Corner& c) {
  uint64_t words[2] = {};
  if (static_cast<unsigned>(c.y - held.first) < static_cast<unsigned>(held.rows) &&
      static_cast<unsigned>(c.x) < static_cast<unsigned>(held.width)) {
    const int64_t at = offset_of(band, c);
    const auto value = [&](int64_t place) -> uint64_t {
      return band.type == Element::f32 ? pair_of(static_cast<const float*>(band.data)[place], 0.0f)
                                       : static_cast<const uint16_t*>(band.data)[place];
    };
#pragma unroll 1
    for (int k = 0; k < 4 && c.channel + k < band.channels; ++k) {
      const int64_t place = at + k * band.stride[3];
      words[0] |= value(place) << (16 * k);
      if (narrow) {
        words[1] |= value(place + band.stride[2]) << (16 * k);
      } else if (c.channel + k + 4 < band.channels) {
        words[1] |= value(place + 4 * band.stride[3]) << (16 * k);
      }
    }
  }
  return {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[0] >> 32), static_cast<uint32_t>(words[1]),
          static_cast<uint32_t>(words[1] >> 32)};
}

// The same of a narrow input whose channels are planes of float32.
__device__ uint4 unit_by_planes(const Band& band, const Held& held, const Corner& c) {
  float2 planes[4] = {};
  if (static_cast<unsigned>(c.y - held.first) < static_cast<unsigned>(held.rows) &&
      static_cast<unsigned>(c.x) < static_cast<unsigned>(held.width)) {
    const float* values = static_cast<const float*>(band.data) + offset_of(band, c);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < band.channels) planes[k] = *reinterpret_cast<const float2*>(values + k * band.stride[3]);
    }
  }
  return {pair_of(planes[0].x, planes[1].x), pair_of(planes[2].x, planes[3].x),
          pair_of(planes[0].y, planes[1].y), pair_of(planes[2].y, planes[3].y)};
}

// kWindow rows from y on and columns from x - 1 on of 16 channels: kColumns of them and one more on either side. `unit`
// says where in its row half a column's channels lie. The columns between are shared out evenly, the outer two apart.
template <int kWindow, int kColumns, int kRow, typename Unit>
__device__ void fetch_window(const Band& band, Reading reading, const Held& held, const Corner& corner, uint4* to,
                             int thread, const Unit& unit) {
  constexpr int kUnits = 2 * kColumns, kAtOnce = kThreads / kUnits;
  static_assert(4 * kWindow <= kThreads);
  if (reading != Reading::vectors) {
#pragma unroll 1
    for (int i = thread; i < kWindow * (kUnits + 4); i += kThreads) {
      const int row = i / (kUnits + 4), column = i % (kUnits + 4) / 2 - 1, half = i % 2;
      const Corner c{corner.sample, corner.y + row, corner.x + column, corner.channel + 8 * half};
      to[row * kRow + unit(column, half)] = unit_by_scalars<false>(band, held, c);
    }
    return;
  }
  const int half = thread % 2;
  Corner c{corner.sample, corner.y + thread / kUnits, corner.x + thread % kUnits / 2, corner.channel + 8 * half};
  const auto rows_held = [&] {  // where column and channels are, too
    const bool there = static_cast<unsigned>(c.x) < static_cast<unsigned>(held.width) && c.channel < band.channels;
    return there ? static_cast<unsigned>(held.rows) : 0u;
  };
  const uint16_t* from = static_cast<const uint16_t*>(band.data) + offset_of(band, c);
  uint4* place = to + thread / kUnits * kRow + unit(thread % kUnits / 2, half);
  const unsigned row = static_cast<unsigned>(c.y - held.first), rows = rows_held();
#pragma unroll
  for (int i = 0; i < kWindow; i += kAtOnce) {
    if (kWindow % kAtOnce == 0 || thread / kUnits + i < kWindow) {
      copy_async(place + i * kRow, from, row + i < rows ? 16 : 0);
    }
    from += kAtOnce * band.stride[1];
  }
  if (thread < 4 * kWindow) {
    const int outer = thread / 2 % 2 == 0 ? -1 : kColumns;
    c.y = corner.y + thread / 4, c.x = corner.x + outer;
    copy_async(to + thread / 4 * kRow + unit(outer, half), static_cast<const uint16_t*>(band.data) + offset_of(band, c),
               static_cast<unsigned>(c.y - held.first) < rows_held() ? 16 : 0);
  }
}

__device__ void fetch_narrow(const Band& band, Reading reading, const Held& held, const Corner& corner, uint4* to,
                             int thread) {
#pragma unroll 1
  for (int i = thread; i < kNarrowUnits; i += kThreads) {
    const Corner c{corner.sample, corner.y + i / kNarrowRow, corner.x + 2 * (i % kNarrowRow) - 2, 0};
    if (reading == Reading::vectors) {
      const bool inside = static_cast<unsigned>(c.y - held.first) < static_cast<unsigned>(held.rows) &&
                          static_cast<unsigned>(c.x) < static_cast<unsigned>(held.width);
      copy_async(to + i, static_cast<const uint16_t*>(band.data) + offset_of(band, c), inside ? 16 : 0);
    } else {
      to[i] = reading == Reading::planes ? unit_by_planes(band, held, c) : unit_by_scalars<true>(band, held, c);
    }
  }
}

// The window of one stage: of the fine input's chunks first, then of the coarse one's.
template <bool narrow, bool decoder>
__device__ void fetch(const HeadLevel& s, const Layout& l, const Tile& tile, int stage, uint4* to, int thread) {
  if (decoder && stage >= l.fine.chunks) {
    const Corner corner{tile.sample, tile.row - 1, tile.column, 16 * (stage - l.fine.chunks)};
    fetch_window<kTileRows + 2, kTileColumns, kCoarseRow>(
        s.coarse, l.coarse.reading, held_coarse(l), corner, to, thread,
        [](int column, int half) { return unit_of(column + 1, half); });
    return;
  }
  const Corner corner{tile.sample, 2 * tile.row - 1, 2 * tile.column, 16 * stage};
  if (narrow) {
    fetch_narrow(s.fine, l.fine.reading, held_fine(l), corner, to, thread);
  } else {
    fetch_window<kWindowRows, 2 * kTileColumns, kFineRow>(
        s.fine, l.fine.reading, held_fine(l), corner, to, thread, [](int column, int half) {
          const int odd = column & 1;
          return odd * kFineOdd + unit_of((column >> 1) + odd, half);
        });
  }
}

// --- Weights -----------------------------------------------------------------------------------------------------------
// The packed weights of one tap and 8 outputs.
struct Packed {
  const uint32_t* weights;
  int at, pairs;  // no pairs: zeros
};

__device__ uint32_t word_of(const Packed& packed, int pair, int output) {
  return pair < packed.pairs ? __ldg(packed.weights + (packed.at + pair * static_cast<int>(kBlock) + output)) : 0;
}

__device__ Packed packed_fine(const HeadLevel& s, const Layout& l, int block, int tap) {
  const int count = static_cast<int>(pairs(s.fine)), taps = static_cast<int>(kTaps);
  return {s.fine_weight, (block * taps + tap) * count * static_cast<int>(kBlock), block < l.blocks && tap < taps ? count : 0};
}
__device__ Packed packed_coarse(const HeadLevel& s, const Layout& l, int block, int type, int phase, int tap) {
  const int count = static_cast<int>(pairs(s.coarse)), at = ((type * 2 + phase) * l.blocks + block) * 9 + tap;
  return {s.coarse_weight, at * count * static_cast<int>(kBlock), block < l.blocks ? count : 0};
}
__device__ Packed packed_edge(const HeadLevel& s, const Layout& l, int block, int type, int side, int tap) {
  const int count = static_cast<int>(pairs(s.coarse)), at = ((type * 2 + side) * l.blocks + block) * 3 + tap;
  return {s.edge_weight, at * count * static_cast<int>(kBlock), block < l.blocks ? count : 0};
}

// Fragments of a stage: fine (tap, block); narrow (tap row, phase, block), where a product's 16 inputs are 4 pixels of
// one row, from column -2 on for even columns and -1 for odd; coarse (tap column, row phase, tap row, phase, block).
template <int NB, bool narrow, bool decoder>
__device__ void load_weights(const HeadLevel& s, const Layout& l, int stage, int first, uint4* to, int thread) {
  const bool fine = !decoder || stage < l.fine.chunks;
  const int fragments = fine ? fine_fragments(NB, narrow) : coarse_fragments(NB);
#pragma unroll 1
  for (int i = thread; i < fragments * kFragment; i += kThreads) {
    const int output = i % 8, half = i / 8 % 2, at = i / kFragment / NB;
    const int block = first + i / kFragment % NB;
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (narrow && fine) {
        const int column = 2 * half + k / 2 - (at % 2 == 0), row = at / 2;
        const bool there = column >= 0 && column < 3 && row < 3;
        words[k] = there ? word_of(packed_fine(s, l, block, 3 * row + column), k % 2, output) : 0;
      } else if (fine) {
        words[k] = word_of(packed_fine(s, l, block, at), kPairs * stage + 4 * half + k, output);
      } else {
        const int phase = at % 2, tap_row = at / 2 % 3, row_phase = at / 6 % 2, tap_column = at / 12;
        const Packed packed = packed_coarse(s, l, block, 1 + row_phase, phase, 3 * tap_row + tap_column);
        words[k] = word_of(packed, kPairs * (stage - l.fine.chunks) + 4 * half + k, output);
      }
    }
    to[i] = uint4{words[0], words[1], words[2], words[3]};
  }
}

template <int NB, bool narrow>
__device__ int weights_at(const Layout& l, int stage) {
  if (!l.resident) return 0;
  const int fine = stage < l.fine.chunks ? stage : l.fine.chunks;
  return kFragment * (fine * fine_fragments(NB, narrow) + (stage - fine) * coarse_fragments(NB));
}

// --- Products ----------------------------------------------------------------------------------------------------------
// A warp's sums: row of the level, phase (even or odd columns), block of outputs, and a fragment of mma.m16n8k16, which PTX
// lays out so over the lanes: registers 0 and 1 are two outputs of column lane / 4, 2 and 3 of the one 8 further.
template <int NB>
using Sums = float[kRows][2][NB][4];

__device__ int row_type(const Layout& l, int y) { return y == 0 ? 0 : y == l.height - 1 ? 3 : 1 + y % 2; }

// Of a lane's two outputs; `kind` numbers the biases of all outputs.
__device__ float2 bias_of(const float* biases, const Layout& l, int kind, int block, int lane) {
  const int output = (kind * l.blocks + block) * static_cast<int>(kBlock) + lane % 4 * 2;
  return *reinterpret_cast<const float2*>(biases + output);
}

// What sums begin with: the bias.
template <int NB, bool decoder>
__device__ void begin(Sums<NB>& sums, const HeadLevel& s, const Layout& l, int y, int block, int lane) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      float2 bias{};
      if (block + n < l.blocks) bias = bias_of(s.bias, l, decoder ? row_type(l, y + row) : 0, block + n, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[row][i / 4][n][i % 4] = i % 2 == 0 ? bias.x : bias.y;
    }
  }
}

// Two fragments of weights that were loaded together.
__device__ void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&pair)[4], int half) {
  const uint32_t b[2] = {pair[2 * half], pair[2 * half + 1]};
  multiply(c, a, b);
}

template <int NB>
__device__ void multiply_fine(Sums<NB>& sums, const uint4* window, const uint4* weights, int lane) {
  constexpr int kLoads = fine_fragments(NB, false) / 2;
  uint32_t b[kLoads][4];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) load_matrices(b[i], weights + 2 * kFragment * i + lane);
#pragma unroll
  for (int row = 0; row < kRows + 2; ++row) {
#pragma unroll
    for (int offset = 0; offset < 4; ++offset) {  // of columns -1 to 2 from an even one
      uint32_t a[4];
      load_matrices(a, window + row * kFineRow + (offset % 2 == 0 ? kFineOdd : 0) + lane_unit(lane, offset / 2));
#pragma unroll
      for (int phase = 0; phase < 2; ++phase) {
        const int tap_column = offset - phase;
        if (tap_column < 0 || tap_column > 2) continue;
#pragma unroll
        for (int tap_row = 0; tap_row < 3; ++tap_row) {
          const int to = row - tap_row;
          if (to < 0 || to >= kRows) continue;
#pragma unroll
          for (int n = 0; n < NB; ++n) {
            const int fragment = (3 * tap_row + tap_column) * NB + n;
            multiply_half(sums[to][phase][n], a, b[fragment / 2], fragment % 2);
          }
        }
      }
    }
  }
}

template <int NB>
__device__ void multiply_narrow(Sums<NB>& sums, const uint4* window, const uint4* weights, int lane) {
  constexpr int kLoads = fine_fragments(NB, true) / 2;
  uint32_t b[kLoads][4];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) load_matrices(b[i], weights + 2 * kFragment * i + lane);
  // Of the four pixels, that which no tap reads becomes zero, as it may be no number.
  const uint32_t first = lane % 4 < 2 ? 0 : 0xffffffffu, last = ~first;
#pragma unroll
  for (int row = 0; row < kRows + 2; ++row) {
#pragma unroll
    for (int phase = 0; phase < 2; ++phase) {
      uint32_t a[4];
      load_matrices(a, window + row * kNarrowRow + lane % 16 + lane / 16 + phase);
      if (phase == 0) {
        a[0] &= first, a[1] &= first;
      } else {
        a[2] &= last, a[3] &= last;
      }
#pragma unroll
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        const int to = row - tap_row;
        if (to < 0 || to >= kRows) continue;
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          const int fragment = (2 * tap_row + phase) * NB + n;
          multiply_half(sums[to][phase][n], a, b[fragment / 2], fragment % 2);
        }
      }
    }
  }
}

template <int NB>
__device__ void multiply_coarse(Sums<NB>& sums, const uint4* window, const uint4* weights, int lane) {
#pragma unroll
  for (int tap_column = 0; tap_column < 3; ++tap_column) {
    uint32_t a[kRows / 2 + 2][4];
#pragma unroll
    for (int row = 0; row < kRows / 2 + 2; ++row) {
      load_matrices(a[row], window + row * kCoarseRow + lane_unit(lane, tap_column));
    }
#pragma unroll
    for (int row_phase = 0; row_phase < 2; ++row_phase) {
      uint32_t b[3 * NB][4];
#pragma unroll
      for (int i = 0; i < 3 * NB; ++i) {
        load_matrices(b[i], weights + 2 * kFragment * ((2 * tap_column + row_phase) * 3 * NB + i) + lane);
      }
#pragma unroll
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
#pragma unroll
        for (int phase = 0; phase < 2; ++phase) {
#pragma unroll
          for (int n = 0; n < NB; ++n) {
            const int fragment = (2 * tap_row + phase) * NB + n;
#pragma unroll
            for (int row = 0; row < kRows / 2; ++row) {
              multiply_half(sums[2 * row + row_phase][phase][n], a[row + tap_row], b[fragment / 2], fragment % 2);
            }
          }
        }
      }
    }
  }
}

// A fragment of weights from where they lie packed.
__device__ void load_packed(uint32_t (&b)[2], const Packed& packed, int first, int lane) {
  b[0] = word_of(packed, first + lane % 4, lane / 4);
  b[1] = word_of(packed, first + lane % 4 + 4, lane / 4);
}

// What differs in the image's first and last row (their weights take the place of other rows') and in its first and last
// column, where the middle tap column reads all that counts, and the bias is another. `y`, `x`: the warp's first pixel;
// `first`: the first pair of the coarse input's chunk.
template <int NB>
__device__ void multiply_edges(Sums<NB>& sums, const HeadLevel& s, const Layout& l, const uint4* window,
                               int y, int x, int block, int first, int lane) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int type = row_type(l, y + row), usual = 1 + row % 2;
    if (type == usual || y + row >= l.height) continue;
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      uint32_t a[4], negative[4];
      load_matrices(a, window + (row / 2 + tap / 3) * kCoarseRow + lane_unit(lane, tap % 3));
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) negative[reg] = a[reg] ^ 0x80008000u;
#pragma unroll
      for (int phase = 0; phase < 2; ++phase) {
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          uint32_t b[2];
          load_packed(b, packed_coarse(s, l, block + n, type, phase, tap), first, lane);
          multiply(sums[row][phase][n], a, b);
          load_packed(b, packed_coarse(s, l, block + n, usual, phase, tap), first, lane);
          multiply(sums[row][phase][n], negative, b);
        }
      }
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {  // the first column is even, the last odd: side and phase are one
    const int column = side == 0 ? -x / 2 : (l.width - x) / 2 - 1;
    if (column < 0 || column >= kTileColumns) continue;
    const uint32_t upper = column == lane / 4 ? 0xffffffffu : 0, lower = column == lane / 4 + 8 ? 0xffffffffu : 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (y + row >= l.height) continue;
#pragma unroll 1
      for (int tap_row = 0; tap_row < 3; ++tap_row) {
        uint32_t a[4];
        load_matrices(a, window + (row / 2 + tap_row) * kCoarseRow + lane_unit(lane, 1));
        a[0] &= upper, a[1] &= lower, a[2] &= upper, a[3] &= lower;
#pragma unroll
        for (int n = 0; n < NB; ++n) {
          uint32_t b[2];
          load_packed(b, packed_edge(s, l, block + n, row_type(l, y + row), side, tap_row), first, lane);
          multiply(sums[row][side][n], a, b);
        }
      }
      if (first > 0) continue;
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        if (block + n >= l.blocks) continue;
        const float2 bias = bias_of(s.edge_bias, l, 2 * row_type(l, y + row) + side, block + n, lane);
        if (upper != 0) sums[row][side][n][0] += bias.x, sums[row][side][n][1] += bias.y;
        if (lower != 0) sums[row][side][n][2] += bias.x, sums[row][side][n][3] += bias.y;
      }
    }
  }
}

// --- Results -----------------------------------------------------------------------------------------------------------
// Among four neighbouring lanes: word i of lane j becomes word j of lane i. Each then holds 16 bytes in a row.
__device__ void transpose(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int by = 1; by <= 2; by *= 2) {
    const bool upper = lane & by;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & by) continue;
      const uint32_t other =
          __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + by], by);
      words[i] = upper ? other : words[i];
      words[i + by] = upper ? words[i + by] : other;
    }
  }
}

// 8 channels of four pixels, of which each of four lanes has a pair, to memory: `at(i)` is pixel i, negative: not wanted.
template <typename At>
__device__ void store_pixels(void* out, int64_t channels, int block, uint32_t (&words)[4], int lane, const At& at) {
  if (channels % kBlock == 0) {
    transpose(words, lane);
    const int64_t pixel = at(lane % 4);
    if (pixel < 0) return;
    uint4* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + pixel * channels + block * kBlock);
    __stwb(to, uint4{words[0], words[1], words[2], words[3]});
    return;
  }
  const int64_t pair = block * kBlock / 2 + lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at(i) >= 0 && 2 * pair < channels) static_cast<uint32_t*>(out)[at(i) * (channels / 2) + pair] = words[i];
  }
}

// From sums to results. `y`, `x`: the warp's first pixel; `block`: its first block of outputs.
template <int NB, bool decoder>
__device__ void finish(const Sums<NB>& sums, const HeadLevel& s, const Layout& l, int sample, int y, int x, int block,
                       int lane) {
  const int outputs = l.blocks * static_cast<int>(kBlock), rows = l.stop - l.start;
  uint32_t words[kRows][NB][4];  // of four columns: lane / 4 and 8 further, even and odd
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* values = sums[row][i % 2][n] + i / 2 * 2;
        words[row][n][i] = pair_of(fast_silu(values[0]), fast_silu(values[1]));
      }
    }
  }
  if (decoder && s.image != nullptr && s.out == nullptr) {
    // Two blocks of outputs, as the sums lie over the lanes, are a fragment of 16 inputs.
    uint32_t b[2];
#pragma unroll
    for (int reg = 0; reg < 2; ++reg) {
      const int pair = lane % 4 + 4 * reg, plane = lane / 4;
      const uint32_t* weights = static_cast<const uint32_t*>(s.out_weight) + plane * (outputs / 2);
      b[reg] = plane < 3 && pair < outputs / 2 ? __ldg(weights + pair) : 0;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float image[2][4] = {};
#pragma unroll
      for (int phase = 0; phase < 2; ++phase) {
        uint32_t a[4] = {words[row][0][phase], words[row][0][2 + phase], 0, 0};
        if (NB == 2) a[2] = words[row][NB - 1][phase], a[3] = words[row][NB - 1][2 + phase];
        multiply(image[phase], a, b);
      }
      if (y + row < l.start || y + row >= l.stop) continue;
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int plane = lane % 4 * 2 + reg % 2;
        const int column = x + 2 * (lane / 4 + reg / 2 * 8);
        if (plane >= 3 || column >= l.width) continue;
        const int64_t pixel = (static_cast<int64_t>(sample * 3 + plane) * rows + y + row - l.start) * l.width + column;
        const float bias = s.out_bias[plane];
        static_cast<uint32_t*>(s.image)[pixel / 2] = pair_of(image[0][reg] + bias, image[1][reg] + bias);
      }
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    if (block + n >= l.blocks) continue;
    if (!decoder && s.pooled != nullptr) {
      uint32_t largest[4];  // of two rows: lane / 4 and 8 further
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 2, at = i % 2 * 2;
        largest[i] = larger_pair(larger_pair(words[row][n][at], words[row][n][at + 1]),
                                 larger_pair(words[row + 1][n][at], words[row + 1][n][at + 1]));
      }
      store_pixels(s.pooled, s.channels, block + n, largest, lane, [&](int i) -> int64_t {
        const int line = y / 2 + i / 2, column = x / 2 + lane / 4 + i % 2 * 8;
        if (2 * line < l.start || 2 * line >= l.stop || 2 * column >= l.width) return -1;
        return (static_cast<int64_t>(sample) * (rows / 2) + line - l.start / 2) * (l.width / 2) + column;
      });
    }
    if (s.out == nullptr) continue;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      store_pixels(s.out, s.channels, block + n, words[row][n], lane, [&](int i) -> int64_t {
        const int column = x + 2 * (lane / 4 + i / 2 * 8) + i % 2;
        if (y + row < l.start || y + row >= l.stop || column >= l.width) return -1;
        return (static_cast<int64_t>(sample) * rows + y + row - l.start) * l.width + column;
      });
    }
  }
}

// --- The kernels -------------------------------------------------------------------------------------------------------
template <int NB, bool narrow, bool decoder>
__global__ void __launch_bounds__(kThreads, decoder ? kDecoders : kEncoders) head_kernel(HeadLevel s, Layout l) {
  uint4* weights = dynamic_shared<uint4>();
  uint4* windows = weights + l.weights;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = static_cast<int>(blockIdx.x) % l.groups, block = group * NB, stages = l.fine.chunks + (decoder ? l.coarse.chunks : 0);
  for (int stage = 0; l.resident && stage < stages; ++stage) {
    load_weights<NB, narrow, decoder>(s, l, stage, block, weights + weights_at<NB, narrow>(l, stage), thread);
  }
  Sums<NB> sums;
  int index = static_cast<int>(blockIdx.x) / l.groups;
  Tile coming = tile_at(l, index), tile = coming;
  // In each round one stage's window is asked for, and the stage before is multiplied.
  for (int stage = -1, turn = 0;; turn ^= 1) {
    const int coming_stage = stage + 1 == stages ? 0 : stage + 1;
    if (index < l.tiles) fetch<narrow, decoder>(s, l, coming, coming_stage, windows + turn * l.window, thread);
    commit_copies();
    if (stage >= 0) {
      if (!l.resident) load_weights<NB, narrow, decoder>(s, l, stage, block, weights, thread);
      wait_copies(1);
      __syncthreads();
      const int y = 2 * tile.row + kRows * warp, x = 2 * tile.column;
      const bool live = y < l.stop && y + kRows > l.start;
      const uint4* window = windows + (turn ^ 1) * l.window;
      const uint4* own = weights + weights_at<NB, narrow>(l, stage);
      if (live && stage == 0) begin<NB, decoder>(sums, s, l, y, block, lane);
      if (live && decoder && stage >= l.fine.chunks) {
        window += kRows / 2 * warp * kCoarseRow;
        multiply_coarse<NB>(sums, window, own, lane);
        if (y == 0 || y + kRows >= l.height || x == 0 || x + 2 * kTileColumns >= l.width) {
          multiply_edges<NB>(sums, s, l, window, y, x, block, kPairs * (stage - l.fine.chunks), lane);
        }
      } else if (live && narrow) {
        multiply_narrow<NB>(sums, window + kRows * warp * kNarrowRow, own, lane);
      } else if (live) {
        multiply_fine<NB>(sums, window + kRows * warp * kFineRow, own, lane);
      }
      __syncthreads();
      if (stage + 1 == stages) {
        if (live) finish<NB, decoder>(sums, s, l, tile.sample, y, x, block, lane);
        if (index >= l.tiles) return;
      }
    }
    tile = coming, stage = coming_stage;
    if (stage + 1 == stages) index += static_cast<int>(gridDim.x) / l.groups, coming = tile_at(l, index);
  }
}

// The last 1x1 convolution, where its inputs are more than a block makes: from `out` to the image.
__global__ void last_kernel(HeadLevel s) {
  const int64_t rows = s.stop - s.start, plane = rows * s.width;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= s.batch * plane) return;
  const uint32_t* values = static_cast<const uint32_t*>(s.out) + index * (s.channels / 2);
  const uint32_t* weights = static_cast<const uint32_t*>(s.out_weight);
  const int64_t count = blocks(s) * kBlock / 2;
  float sums[3] = {s.out_bias[0], s.out_bias[1], s.out_bias[2]};
  const auto add = [&](uint32_t word, int64_t pair) {
    const float2 value = values_of(word);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const float2 weight = values_of(__ldg(weights + c * count + pair));
      sums[c] += value.x * weight.x + value.y * weight.y;
    }
  };
  int64_t pair = 0;
  if (s.channels % kBlock == 0) {
    for (; pair < s.channels / 2; pair += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(values + pair);
      add(four.x, pair), add(four.y, pair + 1), add(four.z, pair + 2), add(four.w, pair + 3);
    }
  }
  for (; pair < s.channels / 2; ++pair) add(values[pair], pair);
  const Divided of = divided(index, plane);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const uint32_t bits = pair_of(sums[c], 0.0f);
    static_cast<uint16_t*>(s.image)[(of.quotient * 3 + c) * plane + of.remainder] = static_cast<uint16_t>(bits);
  }
}

template <int NB, bool narrow, bool decoder>
const char* launch_level(const HeadLevel& s, void* stream) {
  const Layout l = layout_of(s, NB);
  const int64_t shared = (l.weights + 2 * l.window) * 16;
  const auto kernel = head_kernel<NB, narrow, decoder>;
  int64_t at_once = 0;
  if (const char* problem = resident_blocks(kernel, kThreads, shared, at_once)) return problem;
  const int64_t most = at_once > l.groups ? at_once / l.groups : 1, each = most < l.tiles ? most : l.tiles;
  return launch(kernel, static_cast<unsigned>(each * l.groups), kThreads, shared, stream, s, l);
}

template <int NB>
const char* launch_of(const HeadLevel& s, void* stream) {
  if (s.coarse.channels == 0) {
    return is_narrow(s.fine) ? launch_level<NB, true, false>(s, stream) : launch_level<NB, false, false>(s, stream);
  }
  return is_narrow(s.fine) ? launch_level<NB, true, true>(s, stream) : launch_level<NB, false, true>(s, stream);
}

}  // namespace

const char* head_level_cuda(const HeadLevel& s, void* stream) {
  if (s.type != Element::bf16) return "the kernel takes bfloat16";
  if (const char* problem = too_many(2 * s.batch * (s.height / 8 + 1) * (s.width / 8 + 1))) return problem;
  // 16 outputs a block, or 8 where the weights of 16 don't fit; but a block that makes the image has all outputs.
  const bool image = s.image != nullptr && s.out == nullptr;
  const bool two = blocks(s) > 1 && (image || layout_of(s, 2).resident || !layout_of(s, 1).resident);
  const char* problem = two ? launch_of<2>(s, stream) : launch_of<1>(s, stream);
  if (problem != nullptr || s.image == nullptr || image) return problem;
  const int64_t pixels = s.batch * (s.stop - s.start) * s.width;
  if ((problem = too_many(pixels))) return problem;
  return launch(last_kernel, blocks_for(pixels, kThreads), kThreads, 0, stream, s);
}

}  // namespace l2p
