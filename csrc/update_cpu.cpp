// The sampler's update and the final image in one pass over memory on the CPU, with PyTorch's own threads.
// See update.h: no fused multiply-add, whatever the processor has. clang: within expressions only, and there are none.
// Before the headers: what is compiled for one processor is inlined there.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu.h"
#include "update.h"

namespace l2p {
namespace {

constexpr int64_t kGrain = 32768;  // pixels worth a thread

template <typename T, bool kGuided>
L2P_INLINE void step_line(const UpdateData& d, const Pixel& start) {
  const float* x = d.x + offset_of(d.x_stride, start);
  const T* __restrict raw = static_cast<const T*>(d.raw) + offset_of(d.raw_stride, start);
  const T* __restrict negative = nullptr;
  if (kGuided) negative = static_cast<const T*>(d.negative) + offset_of(d.negative_stride, start);
  float* out = d.out + offset_of(d.out_stride, start);
  const int64_t width = d.size[3], xs = d.x_stride[3], rs = d.raw_stride[3], ns = d.negative_stride[3],
                os = d.out_stride[3];
  const auto value = [&](int64_t i, int64_t j, int64_t k) L2P_INLINE_LAMBDA {
    const float v = static_cast<float>(load(raw[j]));
    return stepped(x[i], kGuided ? guided(v, static_cast<float>(load(negative[k])), d.guidance) : v, d.dt);
  };
  if (xs == 1 && rs == 1 && os == 1 && (ns == 1 || !kGuided)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) out[i] = value(i, i, i);
  } else {
    for (int64_t i = 0; i < width; ++i) out[i * os] = value(i * xs, i * rs, i * ns);
  }
}

void step_lines(const UpdateData& d, Element raw_type, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA {
    with_type(raw_type, [&](auto type) L2P_INLINE_LAMBDA {
      for (int64_t line = begin; line < end; ++line) {
        const Pixel start = pixel_at(d.size, line * d.size[3]);
        if (d.negative != nullptr) {
          step_line<decltype(type), true>(d, start);
        } else {
          step_line<decltype(type), false>(d, start);
        }
      }
    });
  });
}

void bytes_of_lines(const ImageData& d, int64_t begin, int64_t end) {
  on_this_cpu([&]() L2P_INLINE_LAMBDA {
    const int64_t channels = d.size[1], height = d.size[2], width = d.size[3];
    for (int64_t line = begin; line < end; ++line) {
      const float* first = d.pixels + offset_of(d.stride, {line / height, 0, line % height, 0});
      uint8_t* __restrict out = d.out + line * width * channels;
      if (channels == 3 && d.stride[3] == 1) {
        const float* __restrict red = first;
        const float* __restrict green = first + d.stride[1];
        const float* __restrict blue = first + 2 * d.stride[1];
        for (int64_t x = 0; x < width; ++x) {
          out[3 * x] = to_byte(red[x]);
          out[3 * x + 1] = to_byte(green[x]);
          out[3 * x + 2] = to_byte(blue[x]);
        }
      } else {
        for (int64_t x = 0; x < width; ++x) {
          for (int64_t c = 0; c < channels; ++c) {
            out[x * channels + c] = to_byte(first[c * d.stride[1] + x * d.stride[3]]);
          }
        }
      }
    }
  });
}

}  // namespace

void euler_step_cpu(const UpdateData& d, Element raw_type) {
  const int64_t lines = d.size[0] * d.size[1] * d.size[2];
  if (d.out != d.x) prefer_huge_pages(d.out, lines * d.size[3] * 4);
  torch::stable::parallel_for(0, lines, std::max<int64_t>(1, kGrain / d.size[3]),
                              [&](int64_t begin, int64_t end) { step_lines(d, raw_type, begin, end); });
}

void to_uint8_cpu(const ImageData& d) {
  const int64_t lines = d.size[0] * d.size[2];
  prefer_huge_pages(d.out, lines * d.size[1] * d.size[3]);
  torch::stable::parallel_for(0, lines, std::max<int64_t>(1, kGrain / (d.size[1] * d.size[3])),
                              [&](int64_t begin, int64_t end) { bytes_of_lines(d, begin, end); });
}

}  // namespace l2p
