// out = SiLU(x [+ other] + bias) and its 2x2 maximum, over feature maps (B, H, W, C).
#pragma once

#include <cstdint>

namespace l2p {

// All dense, in bfloat16 but for the bias: of one kind, or of 9 (rows: first, between, last; times columns likewise).
struct ActivateData {
  const void *x, *other;  // other may be null
  const float* bias;      // (kinds, C)
  void *out, *pooled;     // either may be null
  int64_t batch, height, width, channels;
  int kinds;
};

// Launches on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* activate_cuda(const ActivateData&, void* stream);

}  // namespace l2p
