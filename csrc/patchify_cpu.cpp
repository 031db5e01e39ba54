// Patchify and unpatchify in one pass over memory on the CPU, with PyTorch's own threads. A loop over runs
// (patchify.h); dense three-channel runs of float32 and bfloat16 take a loop that the compiler turns into vector
// shuffles, everything else goes element by element.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu.h"
#include "patchify.h"

namespace l2p {
namespace {

template <typename Pixel, typename Token>
L2P_INLINE void dense_run(Direction direction, Pixel* pixels, int64_t channel_stride, Token* tokens, int64_t patch) {
  Pixel* __restrict red = pixels;
  Pixel* __restrict green = pixels + channel_stride;
  Pixel* __restrict blue = pixels + 2 * channel_stride;
  Token* __restrict out = tokens;
  if (direction == Direction::to_tokens) {
    for (int64_t x = 0; x < patch; ++x) {
      store(out[3 * x], load(red[x]));
      store(out[3 * x + 1], load(green[x]));
      store(out[3 * x + 2], load(blue[x]));
    }
  } else {
    for (int64_t x = 0; x < patch; ++x) {
      store(red[x], load(out[3 * x]));
      store(green[x], load(out[3 * x + 1]));
      store(blue[x], load(out[3 * x + 2]));
    }
  }
}

template <typename Pixel, typename Token>
L2P_INLINE void dense_runs(Direction direction, const PatchLayout& s, void* pixels, void* tokens, int64_t begin,
                           int64_t end) {
  const int64_t columns = s.width / s.patch, bytes = s.patch * 3 * static_cast<int64_t>(sizeof(Token));
  for (int64_t index = begin; index < end;) {
    const Run first = run_at(s, index);
    const int64_t line_end = std::min(end, index - index % columns + columns);
    Pixel* pixel = static_cast<Pixel*>(pixels) + pixel_offset(s, first, 0, 0);
    Token* token = static_cast<Token*>(tokens) + token_offset(s, first, 0, 0);
    for (; index < line_end; ++index, pixel += s.patch, token += s.token_stride[1]) {
      // Runs of neighbouring tokens are far apart in memory, which the processor does not foresee.
      const char* ahead = reinterpret_cast<const char*>(token + 2 * s.token_stride[1]);
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
      dense_run(direction, pixel, s.pixel_stride[1], token, s.patch);
    }
  }
}

using DenseRuns = void (*)(Direction, const PatchLayout&, void*, void*, int64_t, int64_t);

template <typename Pixel, typename Token>
void dense_runs_here(Direction d, const PatchLayout& s, void* pixels, void* tokens, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA { dense_runs<Pixel, Token>(d, s, pixels, tokens, begin, end); });
}

// Null where only the general loop applies.
DenseRuns dense_runs_for(Element pixel_type, Element token_type) {
  const bool wide_pixels = pixel_type == Element::f32, wide_tokens = token_type == Element::f32;
  if (!(wide_pixels || pixel_type == Element::bf16) || !(wide_tokens || token_type == Element::bf16)) return nullptr;
  if (wide_pixels) return wide_tokens ? dense_runs_here<float, float> : dense_runs_here<float, Bits16>;
  return wide_tokens ? dense_runs_here<Bits16, float> : dense_runs_here<Bits16, Bits16>;
}

template <typename Pixel, typename Token>
void any_runs(Direction direction, const PatchLayout& s, Pixel* pixels, Token* tokens, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Run run = run_at(s, index);
    for (int64_t x = 0; x < s.patch; ++x) {
      for (int64_t c = 0; c < s.channels; ++c) {
        Pixel& pixel = pixels[pixel_offset(s, run, x, c)];
        Token& token = tokens[token_offset(s, run, x, c)];
        if (direction == Direction::to_tokens) {
          store(token, load(pixel));
        } else {
          store(pixel, load(token));
        }
      }
    }
  }
}

}  // namespace

void patchify_cpu(Direction direction, const PatchLayout& s, void* pixels, Element pixel_type, void* tokens,
                  Element token_type) {
  const bool to_tokens = direction == Direction::to_tokens;
  prefer_huge_pages(to_tokens ? tokens : pixels,
                    run_count(s) * s.patch * s.channels * element_bytes(to_tokens ? token_type : pixel_type));
  const DenseRuns dense = runs_are_dense(s, 1) ? dense_runs_for(pixel_type, token_type) : nullptr;
  const int64_t grain = std::max<int64_t>(1, 32768 / (s.patch * s.channels));  // elements worth a thread
  torch::stable::parallel_for(0, run_count(s), grain, [&](int64_t begin, int64_t end) {
    if (dense != nullptr) {
      dense(direction, s, pixels, tokens, begin, end);
      return;
    }
    with_type(pixel_type, [&](auto pixel) {
      with_type(token_type, [&](auto token) {
        any_runs(direction, s, static_cast<decltype(pixel)*>(pixels), static_cast<decltype(token)*>(tokens), begin,
                 end);
      });
    });
  });
}

}  // namespace l2p
