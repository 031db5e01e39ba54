// The index arithmetic of the transformer's norm steps, written once for the CPU and the CUDA kernels, so that the
// tests on a CPU check both.
//
// A *row* is what one norm runs over: the D values of one token (block norms) or the E = D / H values of one of its
// heads (query and key norms). Rows are numbered over (B, N, H), H fastest, with H = 1 for the block norms. The rows of
// a *group* follow each other and share one row of scale or gate. A *slab* is some consecutive rows of one group: what
// one thread (CPU) or one block (CUDA) takes, and what one row of partial sums of the backward comes from. Slabs depend
// on sizes alone and their sums are added up in order, so gradients depend neither on threads nor on the device's load.
#pragma once

#include <cstdint>

#include "index.h"

namespace l2p {

enum class Modulation { none, scale, gate };  // a row is multiplied by 1, 1 + scale or tanh(gate)
enum class Rounding { none, int8, e4m3 };     // results in a byte each, with a scale for each row

struct NormShape {
  int64_t batch, tokens, heads, width;
  int64_t x_stride[3], residual_stride[3];  // B, N, H in elements; rows themselves are dense
  int64_t angle_stride[2];                  // B, N of cos and sin
  int64_t groups, modulation_stride;        // of a group
  int64_t slab_rows;
  Modulation modulation;
  Rounding rounding;
  double eps;
};

// Results, and in the backward the gradient that is given, are dense. Null: there is none.
struct NormData {
  const void *x, *weight, *modulation, *residual;
  const float *cos, *sin;
  void* out;
  float* row_scale;  // with rounding: by which a row's bytes are multiplied
  const void* grad;
  void *x_grad, *weight_grad, *modulation_grad;
  void* sums;  // (slabs, D) float, or double for double: sums over a slab of grad * normed x
};

struct Slab {
  int64_t group, begin, end;  // rows
};

L2P_HOST_DEVICE inline int64_t row_count(const NormShape& s) { return s.batch * s.tokens * s.heads; }

L2P_HOST_DEVICE inline int64_t slabs_of_group(const NormShape& s) {
  return (row_count(s) / s.groups + s.slab_rows - 1) / s.slab_rows;
}

L2P_HOST_DEVICE inline Slab slab_at(const NormShape& s, int64_t index) {
  const int64_t rows = divided(row_count(s), s.groups).quotient;
  const Divided slab = divided(index, divided(rows + s.slab_rows - 1, s.slab_rows).quotient);
  const int64_t begin = slab.remainder * s.slab_rows, first = slab.quotient * rows;
  return {slab.quotient, first + begin, first + (begin + s.slab_rows < rows ? begin + s.slab_rows : rows)};
}

L2P_HOST_DEVICE inline int64_t row_offset(const NormShape& s, const int64_t stride[3], int64_t row) {
  const Divided head = divided(row, s.heads), token = divided(head.quotient, s.tokens);
  return token.quotient * stride[0] + token.remainder * stride[1] + head.remainder * stride[2];
}

// Where the angles of the row's token begin: E / 2 of them.
L2P_HOST_DEVICE inline int64_t angle_offset(const NormShape& s, int64_t row) {
  const Divided token = divided(divided(row, s.heads).quotient, s.tokens);
  return token.quotient * s.angle_stride[0] + token.remainder * s.angle_stride[1];
}

// The scale of a row whose largest value is `largest`; of zeros not 0, which is divided by. NaN stays.
L2P_HOST_DEVICE inline float scale_of(float largest, Rounding rounding) {
  return (largest < 1e-12f ? 1e-12f : largest) / (rounding == Rounding::int8 ? 127.0f : 448.0f);
}

// The larger of two, or the one that is NaN.
template <typename A>
L2P_HOST_DEVICE inline A larger(A a, A b) {
  return a > b || a != a ? a : b;
}

// Rows of a slab: enough to be worth a thread, or a block of the forward and the backward.
inline int64_t slab_rows_cpu(int64_t width) { return width < 245760 ? 245760 / (width > 0 ? width : 1) : 1; }
inline int64_t slab_rows_cuda(bool heads, bool backward) { return heads ? 128 : backward ? 8 : 4; }

void norm_forward_cpu(const NormShape&, const NormData&, Element);
void norm_backward_cpu(const NormShape&, const NormData&, Element);

// These launch on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* norm_forward_cuda(const NormShape&, const NormData&, Element, void* stream);
const char* norm_backward_cuda(const NormShape&, const NormData&, Element, void* stream);

}  // namespace l2p
