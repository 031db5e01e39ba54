// What one level of the Detailer Head is, as the CPU and the CUDA kernels see it: plain pointers, shapes and the
// index arithmetic that both share. The mathematics and the layouts are described in l2p_fast/ops/head.py.
//
// Feature maps are (rows, W, C), channels innermost, bfloat16 or, on a CPU, float32; a band holds some rows of an image.
// Weights are packed (block of 8 outputs, tap row, tap column, pair of inputs, 8 outputs, 2 inputs): one 32-bit word is a
// pair of inputs for one output, what both AVX-512's dot product and a tensor core's fragment take. In float32 a word is
// one input, and Winograd's four rows (head_cpu.h) take the place of the three tap rows.
#pragma once

#include <cstdint>

#include "element.h"

namespace l2p {

constexpr int64_t kBlock = 8;  // output channels that are packed together
constexpr int64_t kTaps = 9;
constexpr int64_t kImageChannels = 16;

// A band of rows [start, ...) of one feature map, or the image itself with any strides.
struct Band {
  const void* data;
  Element type;
  int64_t start;      // its first row in the whole image
  int64_t stride[4];  // B, row, column, channel, in elements
  int64_t channels;
};

// out = SiLU(conv3x3(fine) [+ conv3x3 by position(coarse)] + bias), rows [start, stop) of `height`, W = `width`.
struct HeadLevel {
  Element type;  // of maps, weights and results
  int64_t batch, height, width, start, stop;
  int64_t channels;  // of the output, even
  Band fine;
  const uint32_t* fine_weight;  // packed
  // The decoder's input, half the size; channels 0: none. Output row y takes the weights of `row_type(y)`, column x those
  // of x % 2; the first and the last column add `edge_weight` of side 0 and 1, which has the middle tap column only.
  Band coarse;
  const uint32_t* coarse_weight;  // (4 row types, 2, packed)
  const uint32_t* edge_weight;    // (4 row types, 2, packed with one tap column)
  const float* bias;              // (blocks * 8), with a coarse input (4 row types, blocks * 8)
  const float* edge_bias;         // (4 row types, 2, blocks * 8)
  // Results, each may be null: the level's output and its 2x2 maximum, dense; or, for the last level, three channels
  // of out_weight (3, blocks * 8) x output + out_bias (3), as dense planes (B, 3, rows, W). On CUDA `out` comes with
  // `image` where the level has more than kImageChannels: the one is then made from the other.
  void* out;
  void* pooled;
  void* image;
  const void* out_weight;
  const float* out_bias;
};

L2P_HOST_DEVICE inline int64_t blocks(const HeadLevel& s) { return (s.channels + kBlock - 1) / kBlock; }
L2P_HOST_DEVICE inline int64_t pairs(const Band& band) { return (band.channels + 1) / 2; }
L2P_HOST_DEVICE inline int64_t words(const HeadLevel& s, const Band& band) {
  return s.type == Element::f32 ? 2 * pairs(band) : pairs(band);
}

// First row, even row, odd row, last row of the image.
L2P_HOST_DEVICE inline int64_t row_type(const HeadLevel& s, int64_t y) {
  return y == 0 ? 0 : y == s.height - 1 ? 3 : 1 + y % 2;
}

L2P_HOST_DEVICE inline int64_t packed_taps(const HeadLevel& s) { return s.type == Element::f32 ? 12 : kTaps; }

// Words between two blocks of packed weights.
L2P_HOST_DEVICE inline int64_t block_words(const HeadLevel& s, const Band& band, int64_t taps) {
  return taps * words(s, band) * kBlock;
}

// Offsets in words of the packed weights of one block.
L2P_HOST_DEVICE inline int64_t fine_weights_at(const HeadLevel& s, int64_t block) {
  return block * block_words(s, s.fine, packed_taps(s));
}
L2P_HOST_DEVICE inline int64_t coarse_weights_at(const HeadLevel& s, int64_t type, int64_t phase, int64_t block) {
  return ((type * 2 + phase) * blocks(s) + block) * block_words(s, s.coarse, packed_taps(s));
}
L2P_HOST_DEVICE inline int64_t edge_weights_at(const HeadLevel& s, int64_t type, int64_t side, int64_t block) {
  return ((type * 2 + side) * blocks(s) + block) * block_words(s, s.coarse, 3);
}

// The kernel for this processor, for either type; null where it has none.
using HeadKernel = void (*)(const HeadLevel&);
HeadKernel head_kernel_cpu();
void head_level_avx2(const HeadLevel&);
void head_level_avx512(const HeadLevel&);

// Launches on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* head_level_cuda(const HeadLevel&, void* stream);

}  // namespace l2p
