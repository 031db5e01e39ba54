// The sampler's update and the final image in one pass over memory on CUDA. The arithmetic is update.h's, which
// the CPU tests check. Where lines are dense and aligned a thread takes 8 pixels of one channel, or 16 pixels of all
// three channels of the image, as 16-byte vectors; anything else goes element by element.
#include "cuda.cuh"
#include "update.h"

namespace l2p {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 8;
constexpr int kPixels = 16;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) step_kernel(UpdateData d, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= chunks) return;
  const Pixel start = pixel_at(d.size, index * N);
  const int64_t raw_at = offset_of(d.raw_stride, start), negative_at = offset_of(d.negative_stride, start);
  const auto x = *reinterpret_cast<const Vector<float, N>*>(d.x + offset_of(d.x_stride, start));
  const auto raw = *reinterpret_cast<const Vector<T, N>*>(static_cast<const T*>(d.raw) + raw_at);
  Vector<float, N> out;
  if (d.negative != nullptr) {
    const auto negative = *reinterpret_cast<const Vector<T, N>*>(static_cast<const T*>(d.negative) + negative_at);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float v = guided(to_float(raw.values[e]), to_float(negative.values[e]), d.guidance);
      out.values[e] = stepped(x.values[e], v, d.dt);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) out.values[e] = stepped(x.values[e], to_float(raw.values[e]), d.dt);
  }
  *reinterpret_cast<Vector<float, N>*>(d.out + offset_of(d.out_stride, start)) = out;
}

__global__ void __launch_bounds__(kThreads) image_kernel(ImageData d, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= chunks) return;
  const int64_t size[4] = {d.size[0], 1, d.size[2], d.size[3]};  // a thread takes all channels
  const Pixel start = pixel_at(size, index * kPixels);
  Vector<uint8_t, 3 * kPixels> bytes;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const float* from = d.pixels + offset_of(d.stride, {start.b, c, start.y, start.x});
    const auto line = *reinterpret_cast<const Vector<float, kPixels>*>(from);
#pragma unroll
    for (int e = 0; e < kPixels; ++e) bytes.values[3 * e + c] = to_byte(line.values[e]);
  }
  *reinterpret_cast<Vector<uint8_t, 3 * kPixels>*>(d.out + index * kPixels * 3) = bytes;
}

__global__ void __launch_bounds__(kThreads) any_image_kernel(ImageData d, int64_t pixels) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= pixels) return;
  const int64_t size[4] = {d.size[0], 1, d.size[2], d.size[3]};
  const Pixel at = pixel_at(size, index);
  for (int64_t c = 0; c < d.size[1]; ++c) {
    d.out[index * d.size[1] + c] = to_byte(d.pixels[offset_of(d.stride, {at.b, c, at.y, at.x})]);
  }
}

bool lines_are_aligned(const void* data, const int64_t stride[4], int bytes) {
  return is_aligned(data) && stride[3] == 1 && stride[0] * bytes % 16 == 0 && stride[1] * bytes % 16 == 0 &&
         stride[2] * bytes % 16 == 0;
}

}  // namespace

const char* euler_step_cuda(const UpdateData& d, Element raw_type, void* stream) {
  const int64_t pixels = d.size[0] * d.size[1] * d.size[2] * d.size[3];
  const int bytes = element_bytes(raw_type);
  const bool dense = d.size[3] % kStep == 0 && lines_are_aligned(d.x, d.x_stride, 4) &&
                     lines_are_aligned(d.out, d.out_stride, 4) && lines_are_aligned(d.raw, d.raw_stride, bytes) &&
                     (d.negative == nullptr || lines_are_aligned(d.negative, d.negative_stride, bytes));
  const int64_t chunks = dense ? pixels / kStep : pixels;
  if (const char* problem = too_many(pixels)) return problem;
  return with_type(raw_type, [&](auto type) {
    using T = decltype(type);
    return launch(dense ? step_kernel<T, kStep> : step_kernel<T, 1>, blocks_for(chunks, kThreads), kThreads, 0, stream, d,
                  chunks);
  });
}

const char* to_uint8_cuda(const ImageData& d, void* stream) {
  const int64_t pixels = d.size[0] * d.size[2] * d.size[3];
  const bool dense = d.size[1] == 3 && d.size[3] % kPixels == 0 && lines_are_aligned(d.pixels, d.stride, 4);
  const int64_t work = dense ? pixels / kPixels : pixels;
  if (const char* problem = too_many(pixels)) return problem;
  return launch(dense ? image_kernel : any_image_kernel, blocks_for(work, kThreads), kThreads, 0, stream, d, work);
}

}  // namespace l2p
