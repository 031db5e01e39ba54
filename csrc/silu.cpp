// PyTorch's face of silu(x) * y: checks what memory safety needs, allocates, hands plain structs to the kernels.
// The schemas, the reference and the choice between them are in l2p_fast/ops/silu.py.
#include "silu.h"

#include <tuple>

#include "checks.h"

namespace l2p {
namespace {

using Launch = void (*)(const SiluData&, const Tensor& x);

// Dense, and as `x` is.
Tensor checked(const Tensor& x, const Tensor& other, const char* what) {
  check_like(x, other, what);
  check_shape(x, other, what);
  return dense(other);
}

template <Launch launch>
Tensor silu_mul(const Tensor& given_x, const Tensor& given_y) {
  const Tensor x = dense(given_x), y = checked(x, given_y, "y");
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  launch({x.data_ptr(), y.data_ptr(), nullptr, out.data_ptr(), nullptr, nullptr, x.numel()}, x);
  return out;
}

template <Launch launch>
std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& given_grad, const Tensor& given_x, const Tensor& given_y) {
  const Tensor x = dense(given_x), y = checked(x, given_y, "y"), grad = checked(x, given_grad, "the gradient");
  Tensor x_grad = torch::stable::new_empty(x, x.sizes()), y_grad = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return {x_grad, y_grad};
  launch({x.data_ptr(), y.data_ptr(), grad.data_ptr(), nullptr, x_grad.data_ptr(), y_grad.data_ptr(), x.numel()}, x);
  return {x_grad, y_grad};
}

void forward_on_cpu(const SiluData& d, const Tensor& x) { silu_mul_cpu(d, element_of(x.scalar_type(), "x")); }
void backward_on_cpu(const SiluData& d, const Tensor& x) { silu_mul_backward_cpu(d, element_of(x.scalar_type(), "x")); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul<forward_on_cpu>));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward<backward_on_cpu>));
}

#ifdef L2P_WITH_CUDA
namespace {

void forward_on_cuda(const SiluData& d, const Tensor& x) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(silu_mul_cuda(d, element_of(x.scalar_type(), "x"), current_cuda_stream(device)), "silu_mul");
}

void backward_on_cuda(const SiluData& d, const Tensor& x) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(silu_mul_backward_cuda(d, element_of(x.scalar_type(), "x"), current_cuda_stream(device)),
               "silu_mul backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CUDA, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul<forward_on_cuda>));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward<backward_on_cuda>));
}
#endif

}  // namespace l2p
