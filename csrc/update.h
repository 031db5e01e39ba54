// The arithmetic of the sampler's update and of the final image, written once for the CPU and the CUDA kernel,
// so that the tests on a CPU check both. Each operation is rounded on its own, never fused into a multiply-add: a seed
// means the same image with kernels and without.
#pragma once

#include <cstdint>
#include <cstring>

#include "index.h"

namespace l2p {

// Pixels (B, C, H, W). Null: there is no negative half. `out` may be `x`.
struct UpdateData {
  const float* x;
  const void *raw, *negative;
  float* out;
  int64_t size[4];
  int64_t x_stride[4], raw_stride[4], negative_stride[4], out_stride[4];  // in elements
  float dt, guidance;
};

// Pixels (B, C, H, W) of any strides to dense (B, H, W, C).
struct ImageData {
  const float* pixels;
  uint8_t* out;
  int64_t size[4], stride[4];
};

struct Pixel {
  int64_t b, c, y, x;
};

// The pixel at `index` of (B, C, H, W).
L2P_HOST_DEVICE inline Pixel pixel_at(const int64_t size[4], int64_t index) {
  const Divided line = divided(index, size[3]), plane = divided(line.quotient, size[2]);
  const Divided sample = divided(plane.quotient, size[1]);
  return {sample.quotient, sample.remainder, plane.remainder, line.remainder};
}

L2P_HOST_DEVICE inline int64_t offset_of(const int64_t stride[4], const Pixel& p) {
  return p.b * stride[0] + p.c * stride[1] + p.y * stride[2] + p.x * stride[3];
}

L2P_HOST_DEVICE inline float multiplied(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

L2P_HOST_DEVICE inline float added(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

L2P_HOST_DEVICE inline float guided(float raw, float negative, float guidance) {
  return added(negative, multiplied(guidance, added(raw, -negative)));
}

// raw is x0 - eps, the negative of the velocity.
L2P_HOST_DEVICE inline float stepped(float x, float raw, float dt) { return added(x, multiplied(dt, -raw)); }

// [-1, 1] to [0, 255], ties to even; what lies outside is clamped. Adding 2^23 rounds and leaves the result in the
// lowest byte.
L2P_HOST_DEVICE inline uint8_t to_byte(float value) {
  float scaled = added(multiplied(value, 127.5f), 127.5f);
  scaled = scaled < 0.0f ? 0.0f : scaled;
  scaled = scaled > 255.0f ? 255.0f : scaled;
  const float shifted = added(scaled, 8388608.0f);
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return static_cast<uint8_t>(bits);
}

void euler_step_cpu(const UpdateData&, Element raw_type);
void to_uint8_cpu(const ImageData&);

// These launch on `stream` (a cudaStream_t) of the current device. Null, or what went wrong.
const char* euler_step_cuda(const UpdateData&, Element raw_type, void* stream);
const char* to_uint8_cuda(const ImageData&, void* stream);

}  // namespace l2p
