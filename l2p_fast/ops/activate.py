"""Bias, SiLU and 2x2 maximum in one pass over a feature map: what follows a convolution of the Detailer Head.

The library's convolutions leave all three to kernels of their own, each of which crosses memory. A convolution over a
concat is a sum of two, so the concat is left out, too: the sum is made here. ``up`` has a bias, which ``dec`` sees
everywhere but beyond the image's edge; so the bias may depend on whether row and column are the first or the last.

B batch, H x W pixels, C channels. Kernels: bfloat16 on CUDA. No gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "l2p_fast::activate", "(Tensor x, Tensor? other, Tensor bias, bool keep, bool pool) -> (Tensor, Tensor)"
)


def activate_reference(
    x: Tensor, other: Tensor | None, bias: Tensor, keep: bool = True, pool: bool = False
) -> tuple[Tensor, Tensor]:
    """`activate` in plain PyTorch: its specification."""
    height, width = x.shape[1:3]
    rows, columns = (torch.ones(size, dtype=torch.long, device=x.device) for size in (height, width))
    if len(bias) == 9:
        rows[-1], columns[-1] = 2, 2
        rows[0], columns[0] = 0, 0
        bias = bias.unflatten(0, (3, 3))[rows][:, columns]
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) + bias.to(wide)
    out = F.silu(out if other is None else out + other.to(wide)).to(x.dtype)
    pooled = F.max_pool2d(out.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) if pool else out[:, :0, ::2]
    out = out if keep else out[:, :0]
    return out.clone(memory_format=torch.contiguous_format), pooled.clone(memory_format=torch.contiguous_format)


torch.library.impl("l2p_fast::activate", "CompositeExplicitAutograd")(activate_reference)


@torch.library.register_fake("l2p_fast::activate")
def _activate_fake(x, other, bias, keep, pool):
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, height if keep else 0, width, channels))
    return out, x.new_empty((batch, height // 2 if pool else 0, width // 2, channels))


def activate(
    x: Tensor, other: Tensor | None, bias: Tensor, *, keep: bool = True, pool: bool = False
) -> tuple[Tensor, Tensor]:
    """SiLU(x + other + bias) and its 2x2 maximum.

    Args:
        x: (B, H, W, C).
        other: of the same shape and dtype, or None.
        bias: (1, C) or (9, C) fp32; 9: for first, inner and last rows those of first, inner and last columns.
        keep, pool: which results are wanted; the other has no rows.

    Returns:
        (B, H, W, C) and (B, H / 2, W / 2, C), dense, in the dtype of x.
    """
    return torch.ops.l2p_fast.activate(x, other, bias, keep, pool)
