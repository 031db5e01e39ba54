// The index arithmetic of patchify and unpatchify, written once for the CPU and the CUDA kernel, so that the tests on
// a CPU check both.
//
// Pixels (B, C, H, W), tokens (B, h*w, P*P*C) with h = H/P, w = W/P and features ordered (row, column, channel), channel
// fastest. A *run* is what one pixel row of one patch holds: P pixels of each channel on one side, P*C features on the
// other. Runs are numbered over (B, H, w), w fastest.
#pragma once

#include <cstdint>

#include "index.h"

namespace l2p {

struct PatchLayout {
  int64_t batch, channels, height, width, patch;
  int64_t pixel_stride[4];  // B, C, H, W, in elements
  int64_t token_stride[3];  // B, token, feature, in elements
};

struct Run {
  int64_t pixel;  // offset of the run's first pixel, channel 0
  int64_t token;  // offset of the run's first feature
};

L2P_HOST_DEVICE inline int64_t run_count(const PatchLayout& s) { return s.batch * s.height * (s.width / s.patch); }

L2P_HOST_DEVICE inline Run run_at(const PatchLayout& s, int64_t index) {
  const int64_t columns = divided(s.width, s.patch).quotient;
  const Divided column = divided(index, columns), line = divided(column.quotient, s.height);
  const int64_t b = line.quotient, y = line.remainder, x = column.remainder * s.patch;
  const Divided row = divided(y, s.patch);  // of patches
  const int64_t token = row.quotient * columns + column.remainder;
  return {b * s.pixel_stride[0] + y * s.pixel_stride[2] + x * s.pixel_stride[3],
          b * s.token_stride[0] + token * s.token_stride[1] + row.remainder * s.patch * s.channels * s.token_stride[2]};
}

// Pixel x (0 .. P-1) of channel c in a run, on either side.
L2P_HOST_DEVICE inline int64_t pixel_offset(const PatchLayout& s, const Run& run, int64_t x, int64_t c) {
  return run.pixel + c * s.pixel_stride[1] + x * s.pixel_stride[3];
}

L2P_HOST_DEVICE inline int64_t token_offset(const PatchLayout& s, const Run& run, int64_t x, int64_t c) {
  return run.token + (x * s.channels + c) * s.token_stride[2];
}

// Three channels, unit strides inside a run and a whole number of chunks of `chunk` pixels: the shape the fast kernels take.
L2P_HOST_DEVICE inline bool runs_are_dense(const PatchLayout& s, int64_t chunk) {
  return s.channels == 3 && s.pixel_stride[3] == 1 && s.token_stride[2] == 1 && s.patch % chunk == 0;
}

enum class Direction { to_tokens, to_pixels };

// `to_tokens` reads pixels and writes tokens, `to_pixels` the reverse. The side that is written is as dense as its shape.
void patchify_cpu(Direction, const PatchLayout&, void* pixels, Element pixel_type, void* tokens, Element token_type);

// Launches on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* patchify_cuda(Direction, const PatchLayout&, void* pixels, Element pixel_type, void* tokens,
                          Element token_type, void* stream);

}  // namespace l2p
