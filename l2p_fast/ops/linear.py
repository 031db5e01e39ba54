"""x W^T + b, in float32 where bfloat16 products are slow.

Without bfloat16 instructions a CPU's library takes ten times as long for x W^T in bfloat16 as in float32, and hundreds
of times for the gradients. The values go to float32 for the product alone and are rounded once: no less exact than the
library. Elsewhere this is PyTorch's own `linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import product_dtype


class _Wide(torch.autograd.Function):
    """The product and its gradients in float32, of tensors that are kept as they are."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, weight), wanted, grad = ctx.saved_tensors, ctx.needs_input_grad, grad.float()
        rows = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(x.dtype) if wanted[0] else None,
            (rows.t() @ x.float().flatten(0, -2)).to(weight.dtype) if wanted[1] else None,
            rows.sum(0).to(weight.dtype) if wanted[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N), differentiable."""
    if torch.compiler.is_compiling() or not x.dtype == weight.dtype != product_dtype(x.dtype, x.device):
        return F.linear(x, weight, bias)
    return _Wide.apply(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
