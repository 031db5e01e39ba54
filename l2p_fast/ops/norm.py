"""The transformer's norms together with what follows them, each in one pass over memory, forward and backward.

Why ops: a block's norm, modulation, gate, residual and RoPE are each bound by memory, and plain PyTorch crosses it once
for every operation; its autograd keeps every intermediate, these keep their inputs. Values are computed in fp32 (fp64
for fp64) and rounded once. The plain form runs where the dispatcher finds no kernel, and for operands of mixed dtypes,
whose result has the dtype PyTorch would promote them to. Left out: second derivatives, gradients of angles.

Letters: B batch, N tokens, D width, H heads, E = D / H head width, eps the norms' epsilon.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import QuantizedRows, quantize_rows

Rope = tuple[Tensor, Tensor]  # cos and sin, each (B or 1, N, 1, E / 2) fp32

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_NORM = "Tensor x, Tensor weight"
torch.library.define("l2p_fast::norm_modulate", f"({_NORM}, Tensor scale, float eps) -> Tensor")
torch.library.define(
    "l2p_fast::norm_modulate_backward",
    f"(Tensor grad, {_NORM}, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "l2p_fast::norm_modulate_quantize", f"({_NORM}, Tensor scale, float eps, ScalarType dtype) -> (Tensor, Tensor)"
)
torch.library.define("l2p_fast::gate_norm_residual", f"(Tensor residual, {_NORM}, Tensor gate, float eps) -> Tensor")
torch.library.define(
    "l2p_fast::gate_norm_backward", f"(Tensor grad, {_NORM}, Tensor gate, float eps) -> (Tensor, Tensor, Tensor)"
)
torch.library.define("l2p_fast::qk_norm_rope", f"({_NORM}, Tensor cos, Tensor sin, float eps) -> Tensor")
torch.library.define(
    "l2p_fast::qk_norm_rope_backward", f"(Tensor grad, {_NORM}, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)"
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32, in ``x``'s dtype."""
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[2i], x[2i + 1]) of x (B, N, H, E) by its angle, in fp32 (fp64 for fp64), to ``x``'s dtype."""
    cos, sin = rope
    real, imaginary = x.to(_wide(x)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def norm_modulate_reference(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`norm_modulate` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    return rms_norm(x, weight, eps) * (1 + scale)


def norm_modulate_quantize_reference(
    x: Tensor, weight: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> QuantizedRows:
    """`norm_modulate_quantize` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    return quantize_rows(norm_modulate_reference(x, weight, scale, eps), dtype)


def gate_norm_residual_reference(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """`gate_norm_residual` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    return torch.addcmul(residual, gate.tanh(), rms_norm(x, weight, eps))


def qk_norm_rope_reference(x: Tensor, weight: Tensor, rope: Rope, eps: float) -> Tensor:
    """`qk_norm_rope` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    return apply_rope(rms_norm(x, weight, eps), rope)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, factor: Tensor | float):
    """Of y = normed x * weight * factor, all wide: the gradient of x, and grad * normed x."""
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, inner = x * r, grad * weight * factor
    return r * (inner - normed * (inner * normed).mean(-1, keepdim=True)), grad * normed


@torch.library.impl("l2p_fast::norm_modulate", "CompositeExplicitAutograd")
def _norm_modulate_plain(*args) -> Tensor:
    return norm_modulate_reference(*args).contiguous()


@torch.library.impl("l2p_fast::norm_modulate_quantize", "CompositeExplicitAutograd")
def _norm_modulate_quantize_plain(*args) -> tuple[Tensor, Tensor]:
    values, scale, _ = norm_modulate_quantize_reference(*args)
    return values.contiguous(), scale.contiguous()


@torch.library.impl("l2p_fast::gate_norm_residual", "CompositeExplicitAutograd")
def _gate_norm_residual_plain(*args) -> Tensor:
    return gate_norm_residual_reference(*args).contiguous()


@torch.library.impl("l2p_fast::qk_norm_rope", "CompositeExplicitAutograd")
def _qk_norm_rope_plain(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return qk_norm_rope_reference(x, weight, (cos, sin), eps).contiguous()


def _block_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, eps: float, gated: bool):
    grad, wide_x, wide_weight, m = (t.to(_wide(x)) for t in (grad, x, weight, modulation))
    factor = m.tanh() if gated else 1 + m
    x_grad, product = _norm_backward(grad, wide_x, wide_weight, eps, factor)
    product = product.sum_to_size(m.shape)
    weight_grad = (product * factor).sum((0, 1))
    m_grad = product * wide_weight * (1 - factor.square() if gated else 1)
    return x_grad.to(x.dtype).contiguous(), weight_grad.to(x.dtype), m_grad.to(x.dtype).contiguous()


@torch.library.impl("l2p_fast::norm_modulate_backward", "CompositeExplicitAutograd")
def _norm_modulate_backward_plain(*args):
    return _block_norm_backward(*args, gated=False)


@torch.library.impl("l2p_fast::gate_norm_backward", "CompositeExplicitAutograd")
def _gate_norm_backward_plain(*args):
    return _block_norm_backward(*args, gated=True)


@torch.library.impl("l2p_fast::qk_norm_rope_backward", "CompositeExplicitAutograd")
def _qk_norm_rope_backward_plain(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float):
    grad, wide_x, wide_weight = (t.to(_wide(x)) for t in (grad, x, weight))
    x_grad, product = _norm_backward(apply_rope(grad, (cos, -sin)), wide_x, wide_weight, eps, 1)
    return x_grad.to(x.dtype).contiguous(), product.sum((0, 1, 2)).to(x.dtype)


@torch.library.register_fake("l2p_fast::norm_modulate")
@torch.library.register_fake("l2p_fast::qk_norm_rope")
def _like_x(x: Tensor, *args) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("l2p_fast::norm_modulate_quantize")
def _quantized_like_x(x: Tensor, weight: Tensor, scale: Tensor, eps: float, dtype: torch.dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("l2p_fast::gate_norm_residual")
def _like_residual(residual: Tensor, *args) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.register_fake("l2p_fast::norm_modulate_backward")
@torch.library.register_fake("l2p_fast::gate_norm_backward")
def _block_norm_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, modulation: Tensor, eps: float):
    return tuple(x.new_empty(t.shape) for t in (x, weight, modulation))


@torch.library.register_fake("l2p_fast::qk_norm_rope_backward")
def _qk_norm_rope_backward_fake(grad: Tensor, x: Tensor, weight: Tensor, *args):
    return x.new_empty(x.shape), x.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gate_norm_residual_setup(ctx, inputs, output) -> None:
    _setup(ctx, inputs[1:], output)


def _norm_modulate_grads(ctx, grad: Tensor):
    return *torch.ops.l2p_fast.norm_modulate_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _gate_norm_residual_grads(ctx, grad: Tensor):
    return grad, *torch.ops.l2p_fast.gate_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _qk_norm_rope_grads(ctx, grad: Tensor):
    return *torch.ops.l2p_fast.qk_norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps), None, None, None


torch.library.register_autograd("l2p_fast::norm_modulate", _norm_modulate_grads, setup_context=_setup)
torch.library.register_autograd(
    "l2p_fast::gate_norm_residual", _gate_norm_residual_grads, setup_context=_gate_norm_residual_setup
)
torch.library.register_autograd("l2p_fast::qk_norm_rope", _qk_norm_rope_grads, setup_context=_setup)


def _fit(x: Tensor, *others: Tensor) -> bool:
    """Whether the op takes these: one floating dtype. Mixed ones are promoted by the plain form."""
    return x.dtype in _DTYPES and all(other.dtype == x.dtype for other in others)


def _per_row(modulation: Tensor, x: Tensor) -> Tensor:
    """(1, N, D) for several samples as (B, N, D): the op takes one row of modulation for consecutive tokens."""
    if modulation.shape[0] == 1 and modulation.shape[1] > 1:
        return modulation.expand(x.shape[0], -1, -1)
    return modulation


def norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * (1 + scale).

    Args:
        x: (B, N, D), any strides.
        weight: (D,), cast to ``x``'s dtype.
        scale: (B or 1, 1 or N, D).

    Returns:
        (B, N, D), contiguous.
    """
    weight = weight.to(x.dtype)
    if not _fit(x, scale):
        return norm_modulate_reference(x, weight, scale, eps)
    return torch.ops.l2p_fast.norm_modulate(x, weight, _per_row(scale, x), eps)


def norm_modulate_quantize(x: Tensor, weight: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> QuantizedRows:
    """`norm_modulate` rounded row by row to 8 bits (`quantize_rows`), for several products to read. No gradients.

    Args:
        x, weight, scale: as `norm_modulate`'s.
        dtype: int8 or float8_e4m3fn.

    Returns:
        values (B, N, D), scales (B, N, 1), contiguous.
    """
    x, weight, scale = x.detach(), weight.detach().to(x.dtype), scale.detach()
    if not _fit(x, scale):
        return norm_modulate_quantize_reference(x, weight, scale, eps, dtype)
    rounded = torch.ops.l2p_fast.norm_modulate_quantize(x, weight, _per_row(scale, x), eps, dtype)
    return QuantizedRows(*rounded, x.dtype)


def gate_norm_residual(residual: Tensor, x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """residual + tanh(gate) * rms_norm(x).

    Args:
        residual, x: (B, N, D), any strides.
        weight: (D,), cast to ``x``'s dtype.
        gate: (B or 1, 1 or N, D).

    Returns:
        (B, N, D), contiguous.
    """
    weight = weight.to(x.dtype)
    if not _fit(x, residual, gate):
        return gate_norm_residual_reference(residual, x, weight, gate, eps)
    return torch.ops.l2p_fast.gate_norm_residual(residual, x, weight, _per_row(gate, x), eps)


def qk_norm_rope(x: Tensor, weight: Tensor, rope: Rope, eps: float) -> Tensor:
    """apply_rope(rms_norm(x)), for queries or keys.

    Args:
        x: (B, N, H, E), any strides; E even.
        weight: (E,), cast to ``x``'s dtype.
        rope: cos and sin, each (B or 1, N, 1, E / 2) fp32; they get no gradient.

    Returns:
        (B, N, H, E), contiguous.
    """
    weight = weight.to(x.dtype)
    if not _fit(x) or rope[0].dtype != torch.float32:
        return qk_norm_rope_reference(x, weight, rope, eps)
    return torch.ops.l2p_fast.qk_norm_rope(x, weight, *rope, eps)
