// PyTorch's face of the norm steps: checks what memory safety needs, allocates, hands plain structs to the
// kernels. The schemas, the references and the choice between them are in l2p_fast/ops/norm.py.
#include "norm.h"

#include <array>
#include <optional>
#include <tuple>

#include "checks.h"

namespace l2p {
namespace {

struct Launcher {
  bool cuda;
  void (*forward)(const NormShape&, const NormData&, const Tensor& x);
  void (*backward)(const NormShape&, const NormData&, const Tensor& x);
};

Tensor with_dense_rows(const Tensor& x) {
  return x.size(x.dim() - 1) > 1 && x.stride(x.dim() - 1) != 1 ? torch::stable::contiguous(x) : x;
}

// x (B, N, D) or (B, N, H, E), weight (D or E).
NormShape shape_of(const Tensor& x, const Tensor& weight, int64_t dims, double eps) {
  STD_TORCH_CHECK(x.dim() == dims, "x must have ", dims, " dimensions");
  check_like(x, weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(dims - 1), "weight must be as wide as x");
  NormShape s{};
  s.batch = x.size(0), s.tokens = x.size(1), s.heads = dims == 4 ? x.size(2) : 1, s.width = x.size(dims - 1);
  for (int i = 0; i < 3; ++i) s.x_stride[i] = i < dims - 1 ? x.stride(i) : 0;
  s.groups = 1, s.modulation = Modulation::none, s.eps = eps;
  return s;
}

// Scale or gate (B, N, D), (B, 1, D) or (1, 1, D); returns it with rows at one stride.
Tensor add_modulation(NormShape& s, const Tensor& x, const Tensor& given, Modulation kind) {
  check_like(x, given, "scale or gate");
  STD_TORCH_CHECK(given.dim() == 3 && given.size(2) == s.width, "scale or gate must be as wide as x");
  const bool per_token = given.size(1) != 1;
  STD_TORCH_CHECK(given.size(0) == s.batch || (given.size(0) == 1 && !per_token),
                  "scale or gate must be (B, N, D), (B, 1, D) or (1, 1, D)");
  STD_TORCH_CHECK(!per_token || given.size(1) == s.tokens, "scale or gate must be (B, N, D), (B, 1, D) or (1, 1, D)");
  Tensor rows = with_dense_rows(given);
  if (per_token && rows.stride(0) != s.tokens * rows.stride(1)) rows = dense(rows);
  s.modulation = kind;
  s.groups = given.size(0) * given.size(1);
  s.modulation_stride = per_token ? rows.stride(1) : rows.stride(0);
  return rows;
}

void check_angles(const NormShape& s, const Tensor& x, const Tensor& angles, const char* what) {
  STD_TORCH_CHECK(angles.scalar_type() == ScalarType::Float, what, " must be float32");
  check_device(x, angles, what);
  STD_TORCH_CHECK(angles.dim() == 4 && (angles.size(0) == s.batch || angles.size(0) == 1) &&
                      angles.size(1) == s.tokens && angles.size(2) == 1 && angles.size(3) * 2 == s.width,
                  what, " must be (B or 1, N, 1, E / 2)");
}

// Returns cos and sin, which must outlive the launch, at the one pair of strides that serves both.
std::tuple<Tensor, Tensor> add_rope(NormShape& s, NormData& d, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_angles(s, x, cos, "cos");
  check_angles(s, x, sin, "sin");
  STD_TORCH_CHECK(cos.size(0) == sin.size(0), "cos and sin must have one shape");
  Tensor c = with_dense_rows(cos), n = with_dense_rows(sin);
  if (c.stride(0) != n.stride(0) || c.stride(1) != n.stride(1)) c = dense(c), n = dense(n);
  s.angle_stride[0] = c.size(0) == 1 ? 0 : c.stride(0);
  s.angle_stride[1] = c.stride(1);
  d.cos = static_cast<const float*>(c.data_ptr());
  d.sin = static_cast<const float*>(n.data_ptr());
  return {c, n};
}

Tensor forward(const Launcher& on, NormShape s, NormData d, const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel() == 0) return out;
  s.slab_rows = on.cuda ? slab_rows_cuda(d.cos != nullptr, false) : slab_rows_cpu(s.width);
  d.x = x.data_ptr(), d.out = out.data_ptr();
  on.forward(s, d, x);
  return out;
}

// Gradients of x, the weight and the modulation (groups, D), which without one is empty.
std::tuple<Tensor, Tensor, Tensor> backward(const Launcher& on, NormShape s, NormData d, const Tensor& given,
                                            const Tensor& x) {
  check_like(x, given, "the gradient");
  check_shape(x, given, "the gradient");
  const Tensor grad = dense(given);
  Tensor x_grad = torch::stable::new_empty(x, x.sizes());
  const bool modulated = s.modulation != Modulation::none;
  if (x.numel() == 0) {
    return {x_grad, torch::stable::new_zeros(x, std::array<int64_t, 1>{s.width}),
            torch::stable::new_zeros(x, std::array<int64_t, 2>{modulated ? s.groups : 0, s.width})};
  }
  Tensor weight_grad = torch::stable::new_empty(x, std::array<int64_t, 1>{s.width});
  Tensor modulation_grad = torch::stable::new_empty(x, std::array<int64_t, 2>{modulated ? s.groups : 0, s.width});
  s.slab_rows = on.cuda ? slab_rows_cuda(d.cos != nullptr, true) : slab_rows_cpu(s.width);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor sums =
      torch::stable::new_empty(x, std::array<int64_t, 2>{s.groups * slabs_of_group(s), s.width}, wide);
  d.x = x.data_ptr(), d.grad = grad.data_ptr(), d.x_grad = x_grad.data_ptr(), d.weight_grad = weight_grad.data_ptr();
  d.modulation_grad = modulation_grad.data_ptr(), d.sums = sums.data_ptr();
  on.backward(s, d, x);
  return {x_grad, weight_grad, modulation_grad};
}

template <const Launcher& on>
Tensor norm_modulate(const Tensor& given, const Tensor& weight, const Tensor& scale, double eps) {
  const Tensor x = with_dense_rows(given), w = dense(weight);
  NormShape s = shape_of(x, w, 3, eps);
  const Tensor rows = add_modulation(s, x, scale, Modulation::scale);
  NormData d{};
  d.weight = w.data_ptr(), d.modulation = rows.data_ptr();
  return forward(on, s, d, x);
}

// In 8 bits, with a scale for each row (B, N, 1).
template <const Launcher& on>
std::tuple<Tensor, Tensor> norm_modulate_quantize(const Tensor& given, const Tensor& weight, const Tensor& scale,
                                                  double eps, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn,
                  "the dtype must be int8 or float8_e4m3fn");
  const Tensor x = with_dense_rows(given), w = dense(weight);
  NormShape s = shape_of(x, w, 3, eps);
  s.rounding = dtype == ScalarType::Char ? Rounding::int8 : Rounding::e4m3;
  s.slab_rows = on.cuda ? slab_rows_cuda(false, false) : slab_rows_cpu(s.width);
  const Tensor rows = add_modulation(s, x, scale, Modulation::scale);
  Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor row_scale =
      torch::stable::new_empty(x, std::array<int64_t, 3>{s.batch, s.tokens, 1}, ScalarType::Float);
  if (out.numel() == 0) return {out, row_scale};
  NormData d{};
  d.x = x.data_ptr(), d.weight = w.data_ptr(), d.modulation = rows.data_ptr(), d.out = out.data_ptr();
  d.row_scale = static_cast<float*>(row_scale.data_ptr());
  on.forward(s, d, x);
  return {out, row_scale};
}

template <const Launcher& on>
Tensor gate_norm_residual(const Tensor& residual, const Tensor& given, const Tensor& weight, const Tensor& gate,
                          double eps) {
  const Tensor x = with_dense_rows(given), w = dense(weight), base = with_dense_rows(residual);
  NormShape s = shape_of(x, w, 3, eps);
  check_like(x, base, "the residual");
  check_shape(x, base, "the residual");
  for (int i = 0; i < 2; ++i) s.residual_stride[i] = base.stride(i);
  const Tensor rows = add_modulation(s, x, gate, Modulation::gate);
  NormData d{};
  d.weight = w.data_ptr(), d.modulation = rows.data_ptr(), d.residual = base.data_ptr();
  return forward(on, s, d, x);
}

template <const Launcher& on>
std::tuple<Tensor, Tensor, Tensor> block_norm_backward(const Tensor& grad, const Tensor& given, const Tensor& weight,
                                                       const Tensor& modulation, double eps, Modulation kind) {
  const Tensor x = with_dense_rows(given), w = dense(weight);
  NormShape s = shape_of(x, w, 3, eps);
  const Tensor rows = add_modulation(s, x, modulation, kind);
  NormData d{};
  d.weight = w.data_ptr(), d.modulation = rows.data_ptr();
  auto [x_grad, weight_grad, modulation_grad] = backward(on, s, d, grad, x);
  return {x_grad, weight_grad, torch::stable::view(modulation_grad, modulation.sizes())};
}

template <const Launcher& on>
std::tuple<Tensor, Tensor, Tensor> norm_modulate_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const Tensor& scale, double eps) {
  return block_norm_backward<on>(grad, x, weight, scale, eps, Modulation::scale);
}

template <const Launcher& on>
std::tuple<Tensor, Tensor, Tensor> gate_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const Tensor& gate, double eps) {
  return block_norm_backward<on>(grad, x, weight, gate, eps, Modulation::gate);
}

template <const Launcher& on>
Tensor qk_norm_rope(const Tensor& given, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor x = with_dense_rows(given), w = dense(weight);
  NormShape s = shape_of(x, w, 4, eps);
  NormData d{};
  d.weight = w.data_ptr();
  const auto kept = add_rope(s, d, x, cos, sin);
  return forward(on, s, d, x);
}

template <const Launcher& on>
std::tuple<Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad, const Tensor& given, const Tensor& weight,
                                                 const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor x = with_dense_rows(given), w = dense(weight);
  NormShape s = shape_of(x, w, 4, eps);
  NormData d{};
  d.weight = w.data_ptr();
  const auto kept = add_rope(s, d, x, cos, sin);
  auto [x_grad, weight_grad, none] = backward(on, s, d, grad, x);
  return {x_grad, weight_grad};
}

const Launcher kCpu{
    false,
    [](const NormShape& s, const NormData& d, const Tensor& x) {
      norm_forward_cpu(s, d, element_of(x.scalar_type(), "x"));
    },
    [](const NormShape& s, const NormData& d, const Tensor& x) {
      norm_backward_cpu(s, d, element_of(x.scalar_type(), "x"));
    },
};

#ifdef L2P_WITH_CUDA
const Launcher kCuda{
    true,
    [](const NormShape& s, const NormData& d, const Tensor& x) {
      const int32_t device = x.get_device_index();
      const torch::stable::accelerator::DeviceGuard guard(device);
      check_launch(norm_forward_cuda(s, d, element_of(x.scalar_type(), "x"), current_cuda_stream(device)), "norm");
    },
    [](const NormShape& s, const NormData& d, const Tensor& x) {
      const int32_t device = x.get_device_index();
      const torch::stable::accelerator::DeviceGuard guard(device);
      check_launch(norm_backward_cuda(s, d, element_of(x.scalar_type(), "x"), current_cuda_stream(device)),
                   "norm backward");
    },
};
#endif

template <const Launcher& on, typename Library>
void implement(Library& m) {
  m.impl("norm_modulate", TORCH_BOX(&norm_modulate<on>));
  m.impl("norm_modulate_quantize", TORCH_BOX(&norm_modulate_quantize<on>));
  m.impl("norm_modulate_backward", TORCH_BOX(&norm_modulate_backward<on>));
  m.impl("gate_norm_residual", TORCH_BOX(&gate_norm_residual<on>));
  m.impl("gate_norm_backward", TORCH_BOX(&gate_norm_backward<on>));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope<on>));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward<on>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CPU, m) { implement<kCpu>(m); }

#ifdef L2P_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(l2p_fast, CUDA, m) { implement<kCuda>(m); }
#endif

}  // namespace l2p
