// PyTorch's face of patchify and unpatchify: checks what memory safety needs, allocates, hands plain structs to the
// kernels. The schemas, the reference and the messages meant for people are in l2p_fast/ops/patchify.py.
#include "patchify.h"

#include <array>

#include "checks.h"

namespace l2p {
namespace {

template <typename Launch>
Tensor patchify(const Tensor& pixels, int64_t patch, ScalarType dtype, const Launch& launch) {
  STD_TORCH_CHECK(pixels.dim() == 4, "pixels must be (B, C, H, W)");
  const int64_t batch = pixels.size(0), channels = pixels.size(1), height = pixels.size(2), width = pixels.size(3);
  STD_TORCH_CHECK(patch > 0 && height % patch == 0 && width % patch == 0, "H and W must be multiples of the patch size");
  const int64_t count = (height / patch) * (width / patch), features = patch * patch * channels;
  const std::array<int64_t, 3> shape{batch, count, features};
  Tensor tokens = torch::stable::new_empty(pixels, shape, dtype);
  if (tokens.numel() == 0) return tokens;
  const PatchLayout layout{batch, channels, height, width, patch,
                           {pixels.stride(0), pixels.stride(1), pixels.stride(2), pixels.stride(3)},
                           {count * features, features, 1}};
  launch(Direction::to_tokens, layout, pixels, tokens);
  return tokens;
}

template <typename Launch>
Tensor unpatchify(const Tensor& tokens, int64_t patch, int64_t height, int64_t width, ScalarType dtype,
                  const Launch& launch) {
  STD_TORCH_CHECK(tokens.dim() == 3, "tokens must be (B, h*w, P*P*C)");
  STD_TORCH_CHECK(patch > 0 && height >= 0 && width >= 0 && height % patch == 0 && width % patch == 0,
                  "H and W must be multiples of the patch size");
  STD_TORCH_CHECK(tokens.size(1) == (height / patch) * (width / patch), "the token count must be (H/P)*(W/P)");
  STD_TORCH_CHECK(tokens.size(2) % (patch * patch) == 0, "the feature count must be a multiple of P*P");
  const int64_t batch = tokens.size(0), channels = tokens.size(2) / (patch * patch);
  const std::array<int64_t, 4> shape{batch, channels, height, width};
  Tensor pixels = torch::stable::new_empty(tokens, shape, dtype);
  if (pixels.numel() == 0) return pixels;
  const PatchLayout layout{batch, channels, height, width, patch,
                           {channels * height * width, height * width, width, 1},
                           {tokens.stride(0), tokens.stride(1), tokens.stride(2)}};
  launch(Direction::to_pixels, layout, pixels, tokens);
  return pixels;
}

void launch_cpu(Direction direction, const PatchLayout& layout, const Tensor& pixels, const Tensor& tokens) {
  patchify_cpu(direction, layout, pixels.data_ptr(), element_of(pixels.scalar_type(), "pixels"), tokens.data_ptr(),
               element_of(tokens.scalar_type(), "tokens"));
}

Tensor patchify_on_cpu(const Tensor& pixels, int64_t patch, ScalarType dtype) {
  return patchify(pixels, patch, dtype, launch_cpu);
}

Tensor unpatchify_on_cpu(const Tensor& tokens, int64_t patch, int64_t height, int64_t width, ScalarType dtype) {
  return unpatchify(tokens, patch, height, width, dtype, launch_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CPU, m) {
  m.impl("patchify", TORCH_BOX(&patchify_on_cpu));
  m.impl("unpatchify", TORCH_BOX(&unpatchify_on_cpu));
}

#ifdef L2P_WITH_CUDA
namespace {

void launch_cuda(Direction direction, const PatchLayout& layout, const Tensor& pixels, const Tensor& tokens) {
  const int32_t device = pixels.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(patchify_cuda(direction, layout, pixels.data_ptr(), element_of(pixels.scalar_type(), "pixels"),
                             tokens.data_ptr(), element_of(tokens.scalar_type(), "tokens"),
                             current_cuda_stream(device)),
               direction == Direction::to_tokens ? "patchify" : "unpatchify");
}

Tensor patchify_on_cuda(const Tensor& pixels, int64_t patch, ScalarType dtype) {
  return patchify(pixels, patch, dtype, launch_cuda);
}

Tensor unpatchify_on_cuda(const Tensor& tokens, int64_t patch, int64_t height, int64_t width, ScalarType dtype) {
  return unpatchify(tokens, patch, height, width, dtype, launch_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&patchify_on_cuda));
  m.impl("unpatchify", TORCH_BOX(&unpatchify_on_cuda));
}
#endif

}  // namespace l2p
