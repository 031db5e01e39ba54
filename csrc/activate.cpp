// PyTorch's face of bias, SiLU and pool: checks what memory safety needs, allocates, hands a plain struct to the kernel.
// The schema and the reference, which runs on a CPU, are in l2p_fast/ops/activate.py.
#include "activate.h"

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"

namespace l2p {

#ifdef L2P_WITH_CUDA
namespace {

std::tuple<Tensor, Tensor> activate(const Tensor& given, std::optional<Tensor> given_other, const Tensor& bias, bool keep,
                                    bool pool) {
  STD_TORCH_CHECK(given.dim() == 4 && given.scalar_type() == ScalarType::BFloat16, "x must be bfloat16 (B, H, W, C)");
  const Tensor x = dense(given);
  ActivateData d{};
  d.batch = x.size(0), d.height = x.size(1), d.width = x.size(2), d.channels = x.size(3);
  STD_TORCH_CHECK(!pool || (d.height % 2 == 0 && d.width % 2 == 0), "an image that is pooled has even sides");
  Tensor other = x;
  if (given_other.has_value()) {
    check_like(x, *given_other, "other");
    check_shape(x, *given_other, "other");
    other = dense(*given_other);
    d.other = other.data_ptr();
  }
  check_device(x, bias, "bias");
  STD_TORCH_CHECK(bias.dim() == 2 && (bias.size(0) == 1 || bias.size(0) == 9) && bias.size(1) == d.channels &&
                      bias.scalar_type() == ScalarType::Float && bias.is_contiguous(),
                  "bias must be dense float32 (1 or 9, C)");
  d.x = x.data_ptr(), d.bias = static_cast<const float*>(bias.data_ptr()), d.kinds = static_cast<int>(bias.size(0));
  const std::array<int64_t, 4> shape{d.batch, keep ? d.height : 0, d.width, d.channels};
  const std::array<int64_t, 4> half{d.batch, pool ? d.height / 2 : 0, d.width / 2, d.channels};
  Tensor out = torch::stable::new_empty(x, shape), pooled = torch::stable::new_empty(x, half);
  if (keep) d.out = out.data_ptr();
  if (pool) d.pooled = pooled.data_ptr();
  if ((keep || pool) && x.numel() > 0) {
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(activate_cuda(d, current_cuda_stream(device)), "activate");
  }
  return {out, pooled};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CUDA, m) { m.impl("activate", TORCH_BOX(&activate)); }
#endif

}  // namespace l2p
