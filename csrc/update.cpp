// PyTorch's face of the sampler's update and of the final image: checks what memory safety needs, allocates,
// hands plain structs to the kernels. The schemas and the references are in l2p_fast/ops/update.py.
#include "update.h"

#include <array>
#include <optional>

#include "checks.h"

namespace l2p {
namespace {

using Step = void (*)(const UpdateData&, const Tensor& raw);
using Image = void (*)(const ImageData&, const Tensor& pixels);

void copy_strides(const Tensor& from, int64_t to[4]) {
  for (int i = 0; i < 4; ++i) to[i] = from.stride(i);
}

void check_half(const Tensor& x, const Tensor& half, const char* what) {
  check_shape(x, half, what);
  check_device(x, half, what);
}

void run(Step step, const Tensor& x, const Tensor& raw, const std::optional<Tensor>& negative, double dt,
         double guidance, const Tensor& out) {
  UpdateData d{};
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, "x must be (B, C, H, W) float32");
  check_half(x, raw, "raw");
  if (negative.has_value()) {
    check_half(x, *negative, "negative");
    STD_TORCH_CHECK(negative->scalar_type() == raw.scalar_type(), "raw and negative must have one dtype");
    d.negative = negative->data_ptr();
    copy_strides(*negative, d.negative_stride);
  }
  if (x.numel() == 0) return;
  d.x = static_cast<const float*>(x.data_ptr()), d.raw = raw.data_ptr(), d.out = static_cast<float*>(out.data_ptr());
  for (int i = 0; i < 4; ++i) d.size[i] = x.size(i);
  copy_strides(x, d.x_stride), copy_strides(raw, d.raw_stride), copy_strides(out, d.out_stride);
  d.dt = static_cast<float>(dt), d.guidance = static_cast<float>(guidance);
  step(d, raw);
}

template <Step step>
Tensor euler_step(const Tensor& x, const Tensor& raw, double dt, const std::optional<Tensor>& negative,
                  double guidance) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  run(step, x, raw, negative, dt, guidance, out);
  return out;
}

template <Step step>
void euler_step_(const Tensor& x, const Tensor& raw, double dt, const std::optional<Tensor>& negative,
                 double guidance) {
  run(step, x, raw, negative, dt, guidance, x);
}

template <Image image>
Tensor to_uint8(const Tensor& pixels) {
  STD_TORCH_CHECK(pixels.dim() == 4 && pixels.scalar_type() == ScalarType::Float,
                  "pixels must be (B, C, H, W) float32");
  ImageData d{};
  for (int i = 0; i < 4; ++i) d.size[i] = pixels.size(i), d.stride[i] = pixels.stride(i);
  Tensor out = torch::stable::new_empty(
      pixels, std::array<int64_t, 4>{d.size[0], d.size[2], d.size[3], d.size[1]}, ScalarType::Byte);
  if (out.numel() == 0) return out;
  d.pixels = static_cast<const float*>(pixels.data_ptr()), d.out = static_cast<uint8_t*>(out.data_ptr());
  image(d, pixels);
  return out;
}

void step_on_cpu(const UpdateData& d, const Tensor& raw) { euler_step_cpu(d, element_of(raw.scalar_type(), "raw")); }
void image_on_cpu(const ImageData& d, const Tensor&) { to_uint8_cpu(d); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CPU, m) {
  m.impl("euler_step", TORCH_BOX(&euler_step<step_on_cpu>));
  m.impl("euler_step_", TORCH_BOX(&euler_step_<step_on_cpu>));
  m.impl("to_uint8", TORCH_BOX(&to_uint8<image_on_cpu>));
}

#ifdef L2P_WITH_CUDA
namespace {

void step_on_cuda(const UpdateData& d, const Tensor& raw) {
  const int32_t device = raw.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(euler_step_cuda(d, element_of(raw.scalar_type(), "raw"), current_cuda_stream(device)), "euler_step");
}

void image_on_cuda(const ImageData& d, const Tensor& pixels) {
  const int32_t device = pixels.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(to_uint8_cuda(d, current_cuda_stream(device)), "to_uint8");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CUDA, m) {
  m.impl("euler_step", TORCH_BOX(&euler_step<step_on_cuda>));
  m.impl("euler_step_", TORCH_BOX(&euler_step_<step_on_cuda>));
  m.impl("to_uint8", TORCH_BOX(&to_uint8<image_on_cuda>));
}
#endif

}  // namespace l2p
