"""Frozen linear weights in 8 or 4 bits, gradients flowing through them.

The weight is dequantized for each product and never kept: forward and backward see the same values, activations are
not quantized. Its error is that of bitsandbytes' blockwise formats (8 bits: dynamic exponent; 4 bits: NF4). Values and
scales are frozen parameters of bytes, so FSDP shards and gathers them as it does any other, and casts neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..ops import product_dtype

BLOCK = {8: 256, 4: 64}  # values that share a scale


class _Linear(torch.autograd.Function):
    """x W^T with W dequantized in both passes; W has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        wide = product_dtype(x.dtype, x.device)
        return F.linear(x.to(wide), layer.weight_in(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        wide = product_dtype(gradient.dtype, gradient.device)
        return (gradient.to(wide) @ ctx.layer.weight_in(wide)).to(gradient.dtype), None


class FrozenLinear(nn.Module):
    """A linear layer whose weight (out, in) is stored in 8 or 4 bits; the bias stays as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int):
        super().__init__()
        functional = _bitsandbytes()
        if bits == 8:
            stored, state = functional.quantize_blockwise(weight.detach(), blocksize=BLOCK[8])
        else:
            stored, state = functional.quantize_4bit(weight.detach(), blocksize=BLOCK[4], quant_type="nf4")
        self.bits, self.shape = bits, tuple(weight.shape)
        self.stored = nn.Parameter(stored.view(-1), requires_grad=False)
        self.scale = nn.Parameter(state.absmax.view(torch.uint8), requires_grad=False)
        self.register_buffer("code", state.code)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in ``dtype``."""
        functional, scale = _bitsandbytes(), self.scale.view(torch.float32)
        if self.bits == 8:
            state = functional.QuantState(scale, code=self.code, blocksize=BLOCK[8], dtype=dtype)
            return functional.dequantize_blockwise(self.stored, state).view(self.shape)
        state = functional.QuantState(
            scale, shape=torch.Size(self.shape), code=self.code, blocksize=BLOCK[4], quant_type="nf4", dtype=dtype
        )
        return functional.dequantize_4bit(self.stored.view(-1, 1), state)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _Linear.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_frozen(module: nn.Module, bits: int, read: Callable[[str, Tensor], Tensor], prefix: str = "") -> None:
    """Replace the linear layers of ``module`` that are not trained, one after the other.

    ``read(name, parameter)`` gives the values of a parameter (which may be on the meta device) where they are to be.
    """
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            if not any(p.requires_grad for p in child.parameters()):
                bias = None if child.bias is None else read(f"{path}.bias", child.bias)
                setattr(module, name, FrozenLinear(read(f"{path}.weight", child.weight), bias, bits))
        else:
            quantize_frozen(child, bits, read, f"{path}.")


def linear_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of a quantized weight with its scales."""
    values = shape[0] * shape[1]
    return values * bits // 8 + -(-values // BLOCK[bits]) * 4


def _bitsandbytes():
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError("model.frozen_bits needs bitsandbytes: pip install l2p_fast[train]") from error
    return functional
