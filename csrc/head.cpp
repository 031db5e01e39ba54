// PyTorch's face of the Detailer Head's levels: checks what memory safety needs, allocates, hands a plain struct to
// the kernels. The schemas, the reference and the layouts are in l2p_fast/ops/head.py.
#include "head.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"

namespace l2p {
namespace {

Band band_of(const Tensor& x, int64_t start, const char* what) {
  STD_TORCH_CHECK(x.dim() == 4, what, " must be (B, rows, W, C)");
  return {x.data_ptr(), element_of(x.scalar_type(), what), start,
          {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, x.size(3)};
}

// Rows [start, stop) of `height` must lie in the band.
void check_rows(const Tensor& x, int64_t x_start, int64_t start, int64_t stop, int64_t height, const char* what) {
  STD_TORCH_CHECK(x_start >= 0 && x_start <= std::max<int64_t>(start, 0) &&
                      x_start + x.size(1) >= std::min(stop, height) && x_start + x.size(1) <= height,
                  what, " lacks rows that the level reads");
}

// The type that a level is computed in; only on a CPU it may be float32.
Element level_type(const Tensor& x, const Tensor& weight) {
  const Element type = element_of(weight.scalar_type(), "weight");
  STD_TORCH_CHECK(type == Element::bf16 || (type == Element::f32 && x.is_cpu()), "weight must be bfloat16",
                  x.is_cpu() ? " or float32" : "");
  return type;
}

ScalarType scalar_type(const HeadLevel& level) {
  return level.type == Element::f32 ? ScalarType::Float : ScalarType::BFloat16;
}

bool is_dense(const HeadLevel& level, const Tensor& x) {
  return x.scalar_type() == scalar_type(level) && x.is_contiguous();
}

void check_weight(const HeadLevel& level, const Tensor& x, const Tensor& weight, std::initializer_list<int64_t> leading,
                  int64_t columns, const Band& band, const char* what) {
  check_device(x, weight, what);
  STD_TORCH_CHECK(is_dense(level, weight), what, " must be dense, of the other weights' type");
  std::array<int64_t, 8> shape{};
  int64_t dims = 0;
  for (int64_t size : leading) shape[dims++] = size;
  const int64_t per = level.type == Element::f32 ? 1 : 2, rows = columns == 3 ? packed_taps(level) / 3 : 3;
  for (int64_t size : {blocks(level), rows, columns, words(level, band), kBlock, per}) shape[dims++] = size;
  STD_TORCH_CHECK(weight.dim() == dims, what, " is not packed as this level needs");
  for (int64_t i = 0; i < dims; ++i) {
    STD_TORCH_CHECK(weight.size(i) == shape[i], what, " is not packed as this level needs");
  }
}

void check_floats(const Tensor& x, const Tensor& values, int64_t count, const char* what) {
  check_device(x, values, what);
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.is_contiguous() && values.numel() == count, what,
                  " must be dense float32 of as many values as the packed weights have outputs");
}

void check_level(int64_t channels, int64_t width, int64_t start, int64_t stop, int64_t height) {
  STD_TORCH_CHECK(channels > 0 && channels % 2 == 0, "a level has an even number of channels");
  STD_TORCH_CHECK(width % 2 == 0 && height % 2 == 0, "a level's image has even sides");
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= height, "rows must lie in the image");
}

const uint32_t* packed(const Tensor& weight) { return static_cast<const uint32_t*>(weight.data_ptr()); }
const float* floats(const Tensor& values) { return static_cast<const float*>(values.data_ptr()); }

using Launch = void (*)(const HeadLevel&, const Tensor&);

template <Launch launch>
std::tuple<Tensor, Tensor> encode(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t channels,
                                  int64_t x_start, int64_t start, int64_t stop, int64_t height, bool keep, bool pool) {
  HeadLevel level{level_type(x, weight)};
  level.fine = band_of(x, x_start, "x");
  level.batch = x.size(0), level.height = height, level.width = x.size(2);
  level.start = start, level.stop = stop, level.channels = channels;
  check_level(channels, level.width, start, stop, height);
  STD_TORCH_CHECK(!pool || (start % 2 == 0 && stop % 2 == 0), "pooled rows come in twos");
  STD_TORCH_CHECK(level.fine.type == Element::bf16 || level.fine.type == Element::f32, "x must be float32 or bfloat16");
  check_rows(x, x_start, start - 1, stop + 1, height, "x");
  check_weight(level, x, weight, {}, 3, level.fine, "weight");
  check_floats(x, bias, blocks(level) * kBlock, "bias");
  level.fine_weight = packed(weight);
  level.bias = floats(bias);
  const int64_t rows = stop - start, kept = keep ? rows : 0, halves = pool ? rows / 2 : 0;
  const std::array<int64_t, 4> shape{level.batch, kept, level.width, channels};
  const std::array<int64_t, 4> half{level.batch, halves, level.width / 2, channels};
  Tensor out = torch::stable::new_empty(x, shape, scalar_type(level));
  Tensor pooled = torch::stable::new_empty(x, half, scalar_type(level));
  if (keep) level.out = out.data_ptr();
  if (pool) level.pooled = pooled.data_ptr();
  if ((keep || pool) && level.batch * rows * level.width > 0) launch(level, x);
  return {out, pooled};
}

// image_channels: the most that a level may have for the kernel to make the image without storing them.
template <Launch launch, int64_t image_channels>
Tensor decode(const Tensor& x, const Tensor& skip, const Tensor& weight, const Tensor& edge_weight,
              const Tensor& skip_weight, const Tensor& bias, const Tensor& edge_bias, std::optional<Tensor> out_weight,
              std::optional<Tensor> out_bias, int64_t channels, int64_t x_start, int64_t skip_start, int64_t start,
              int64_t stop, int64_t height) {
  HeadLevel level{level_type(x, weight)};
  level.fine = band_of(skip, skip_start, "skip");
  level.coarse = band_of(x, x_start, "x");
  level.batch = skip.size(0), level.height = height, level.width = skip.size(2);
  level.start = start, level.stop = stop, level.channels = channels;
  check_level(channels, level.width, start, stop, height);
  STD_TORCH_CHECK(x.size(0) == level.batch && x.size(2) == level.width / 2, "x must be half the size of skip");
  for (const Tensor& map : {x, skip}) {
    const bool dense = map.stride(3) == 1 && (map.size(2) == 1 || map.stride(2) == map.size(3));
    STD_TORCH_CHECK(map.scalar_type() == scalar_type(level) && map.size(3) % 2 == 0 && dense,
                    "x and skip must be of the weights' type, each row dense, of an even number of channels");
  }
  check_device(x, skip, "skip");
  check_rows(skip, skip_start, start - 1, stop + 1, height, "skip");
  check_rows(x, x_start, start / 2 - 1, (stop + 1) / 2 + 1, height / 2, "x");
  check_weight(level, x, weight, {4, 2}, 3, level.coarse, "weight");
  check_weight(level, x, edge_weight, {4, 2}, 1, level.coarse, "edge_weight");
  check_weight(level, x, skip_weight, {}, 3, level.fine, "skip_weight");
  check_floats(x, bias, 4 * blocks(level) * kBlock, "bias");
  check_floats(x, edge_bias, 8 * blocks(level) * kBlock, "edge_bias");
  level.coarse_weight = packed(weight);
  level.edge_weight = packed(edge_weight);
  level.fine_weight = packed(skip_weight);
  level.bias = floats(bias);
  level.edge_bias = floats(edge_bias);
  const int64_t rows = stop - start;
  const bool last = out_weight.has_value();
  const std::array<int64_t, 4> shape{level.batch, last ? 3 : rows, last ? rows : level.width, last ? level.width : channels};
  Tensor out = torch::stable::new_empty(skip, shape, scalar_type(level));
  if (last) {
    STD_TORCH_CHECK(out_bias.has_value(), "out_weight comes with out_bias");
    check_device(x, *out_weight, "out_weight");
    STD_TORCH_CHECK(is_dense(level, *out_weight) && out_weight->numel() == 3 * blocks(level) * kBlock,
                    "out_weight must be dense (3, outputs of the packed weights), of their type");
    check_floats(x, *out_bias, 3, "out_bias");
    level.out_weight = out_weight->data_ptr();
    level.out_bias = floats(*out_bias);
  }
  (last ? level.image : level.out) = out.data_ptr();
  const bool stored = last && channels > image_channels;
  const std::array<int64_t, 4> inner{level.batch, stored ? rows : 0, level.width, channels};
  Tensor between = torch::stable::new_empty(skip, inner, scalar_type(level));
  if (stored) level.out = between.data_ptr();
  if (level.batch * rows * level.width > 0) launch(level, skip);
  return out;
}

void launch_cpu(const HeadLevel& level, const Tensor&) { head_kernel_cpu()(level); }

}  // namespace

// Where the processor lacks what the kernel needs, PyTorch's dispatcher goes on to the reference.
STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CPU, m) {
  if (head_kernel_cpu() == nullptr) return;
  m.impl("head_encode", TORCH_BOX(&encode<launch_cpu>));
  m.impl("head_decode", TORCH_BOX((&decode<launch_cpu, std::numeric_limits<int64_t>::max()>)));
}

#ifdef L2P_WITH_CUDA
namespace {

void launch_cuda(const HeadLevel& level, const Tensor& on) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(head_level_cuda(level, current_cuda_stream(device)), "head");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CUDA, m) {
  m.impl("head_encode", TORCH_BOX(&encode<launch_cuda>));
  m.impl("head_decode", TORCH_BOX((&decode<launch_cuda, kImageChannels>)));
}
#endif

}  // namespace l2p
