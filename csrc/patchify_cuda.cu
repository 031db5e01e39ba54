// Patchify and unpatchify in one pass over memory on CUDA. The index arithmetic is patchify.h's, which the CPU tests
// check. The dense kernel gives each thread 8 pixels of all three channels: 8 contiguous elements from each channel on one side, 24
// contiguous elements on the other, all moved as 16-byte vectors. Anything else goes element by element.
#include "cuda.cuh"
#include "patchify.h"

namespace l2p {
namespace {

constexpr int kChunk = 8;  // pixels of one thread: 16 bytes of a 2-byte type
constexpr int kThreads = 256;

template <typename Pixel, typename Token>
__global__ void __launch_bounds__(kThreads)
    dense_kernel(Direction direction, PatchLayout s, Pixel* pixels, Token* tokens, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= chunks) return;
  const Divided chunk = divided(index, s.patch / kChunk);
  const Run run = run_at(s, chunk.quotient);
  const int64_t x = chunk.remainder * kChunk;
  Token* token = tokens + token_offset(s, run, x, 0);
  Vector<Pixel, kChunk> planar[3];
  Vector<Token, 3 * kChunk> interleaved;
  if (direction == Direction::to_tokens) {
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      planar[c] = *reinterpret_cast<const Vector<Pixel, kChunk>*>(pixels + pixel_offset(s, run, x, c));
    }
#pragma unroll
    for (int i = 0; i < 3 * kChunk; ++i) interleaved.values[i] = convert<Token>(planar[i % 3].values[i / 3]);
    *reinterpret_cast<Vector<Token, 3 * kChunk>*>(token) = interleaved;
  } else {
    interleaved = *reinterpret_cast<const Vector<Token, 3 * kChunk>*>(token);
#pragma unroll
    for (int i = 0; i < 3 * kChunk; ++i) planar[i % 3].values[i / 3] = convert<Pixel>(interleaved.values[i]);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      *reinterpret_cast<Vector<Pixel, kChunk>*>(pixels + pixel_offset(s, run, x, c)) = planar[c];
    }
  }
}

template <typename Pixel, typename Token>
__global__ void __launch_bounds__(kThreads)
    any_kernel(Direction direction, PatchLayout s, Pixel* pixels, Token* tokens, int64_t elements) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= elements) return;
  const Divided feature = divided(index, s.patch * s.channels), channel = divided(feature.remainder, s.channels);
  const Run run = run_at(s, feature.quotient);
  const int64_t x = channel.quotient, c = channel.remainder;
  Pixel& pixel = pixels[pixel_offset(s, run, x, c)];
  Token& token = tokens[token_offset(s, run, x, c)];
  if (direction == Direction::to_tokens) {
    token = convert<Token>(pixel);
  } else {
    pixel = convert<Pixel>(token);
  }
}

// Every address a dense thread touches is a multiple of 16 bytes from the start of its tensor, and the tensor's start is.
bool vectors_are_aligned(const PatchLayout& s, const void* pixels, Element pixel_type, const void* tokens,
                         Element token_type) {
  const int64_t pixel_bytes = element_bytes(pixel_type), token_bytes = element_bytes(token_type);
  return is_aligned(pixels) && is_aligned(tokens) && s.pixel_stride[0] * pixel_bytes % 16 == 0 &&
         s.pixel_stride[1] * pixel_bytes % 16 == 0 && s.pixel_stride[2] * pixel_bytes % 16 == 0 &&
         s.token_stride[0] * token_bytes % 16 == 0 && s.token_stride[1] * token_bytes % 16 == 0;
}

}  // namespace

const char* patchify_cuda(Direction direction, const PatchLayout& s, void* pixels, Element pixel_type, void* tokens,
                          Element token_type, void* stream) {
  if (run_count(s) == 0 || s.channels == 0) return nullptr;
  const bool dense =
      runs_are_dense(s, kChunk) && vectors_are_aligned(s, pixels, pixel_type, tokens, token_type);
  const int64_t elements = run_count(s) * s.patch * s.channels, work = dense ? elements / (3 * kChunk) : elements;
  if (const char* problem = too_many(elements)) return problem;
  return with_type(pixel_type, [&](auto pixel) {
    return with_type(token_type, [&](auto token) {
      using Pixel = decltype(pixel);
      using Token = decltype(token);
      return launch(dense ? dense_kernel<Pixel, Token> : any_kernel<Pixel, Token>, blocks_for(work, kThreads), kThreads, 0,
                    stream, direction, s, static_cast<Pixel*>(pixels), static_cast<Token*>(tokens), work);
    });
  });
}

}  // namespace l2p
