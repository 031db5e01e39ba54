"""silu(x) * y, the gate of the feed-forward, in one pass over memory, forward and backward.

One op, as plain PyTorch crosses memory twice, and its autograd keeps silu(x) as well; this keeps x and y. Values are
computed in fp32 (fp64 for fp64) and rounded once. Left out: second derivatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

torch.library.define("l2p_fast::silu_mul", "(Tensor x, Tensor y) -> Tensor")
torch.library.define("l2p_fast::silu_mul_backward", "(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor)")


def silu_mul_reference(x: Tensor, y: Tensor) -> Tensor:
    """`silu_mul` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    return F.silu(x) * y


@torch.library.impl("l2p_fast::silu_mul", "CompositeExplicitAutograd")
def _silu_mul_plain(x: Tensor, y: Tensor) -> Tensor:
    return silu_mul_reference(x, y).contiguous()


@torch.library.impl("l2p_fast::silu_mul_backward", "CompositeExplicitAutograd")
def _silu_mul_backward_plain(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x_grad = torch.ops.aten.silu_backward(grad * y, x)
    return x_grad.contiguous(), (grad * F.silu(x)).contiguous()


@torch.library.register_fake("l2p_fast::silu_mul")
def _silu_mul_fake(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("l2p_fast::silu_mul_backward")
def _silu_mul_backward_fake(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.l2p_fast.silu_mul_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("l2p_fast::silu_mul", _grads, setup_context=_setup)


def silu_mul(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y of one shape, any strides -> the same shape, contiguous.

    Operands of different shapes or dtypes are left to PyTorch, which broadcasts and promotes them.
    """
    if x.shape != y.shape or x.dtype != y.dtype or x.dtype not in _DTYPES:
        return silu_mul_reference(x, y)
    return torch.ops.l2p_fast.silu_mul(x, y)
