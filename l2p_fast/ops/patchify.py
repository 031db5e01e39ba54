"""Pixels to tokens and back in one pass, with the change of dtype on the way.

One op, as PyTorch's permute + copy + cast crosses memory twice, first with the whole fp32 state of a 4096 px image.
Either function is the other's backward. Left out: overlapping patches and padding; sizes are multiples of the patch.

Letters: B batch, C channels, H and W pixels, P patch side, h = H/P, w = W/P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

torch.library.define("l2p_fast::patchify", "(Tensor pixels, int patch_size, ScalarType dtype) -> Tensor")
torch.library.define(
    "l2p_fast::unpatchify", "(Tensor tokens, int patch_size, int height, int width, ScalarType dtype) -> Tensor"
)


def patchify_reference(pixels: Tensor, patch_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """`patchify` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    b, c, height, width = pixels.shape
    p, h, w = patch_size, height // patch_size, width // patch_size
    cells = pixels.reshape(b, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, P, P, C)
    return cells.reshape(b, h * w, p * p * c).to(dtype or pixels.dtype).clone(memory_format=torch.contiguous_format)


def unpatchify_reference(
    tokens: Tensor, patch_size: int, height: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`unpatchify` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    b, _, features = tokens.shape
    p, h, w = patch_size, height // patch_size, width // patch_size
    cells = tokens.reshape(b, h, w, p, p, features // (p * p)).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, P, w, P)
    pixels = cells.reshape(b, features // (p * p), height, width)
    return pixels.to(dtype or tokens.dtype).clone(memory_format=torch.contiguous_format)


for _name, _reference in (("patchify", patchify_reference), ("unpatchify", unpatchify_reference)):
    torch.library.impl(f"l2p_fast::{_name}", "CompositeExplicitAutograd")(_reference)


@torch.library.register_fake("l2p_fast::patchify")
def _patchify_fake(pixels: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    b, c, height, width = pixels.shape
    shape = (b, (height // patch_size) * (width // patch_size), patch_size * patch_size * c)
    return pixels.new_empty(shape, dtype=dtype)


@torch.library.register_fake("l2p_fast::unpatchify")
def _unpatchify_fake(tokens: Tensor, patch_size: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return tokens.new_empty((tokens.shape[0], tokens.shape[2] // (patch_size * patch_size), height, width), dtype=dtype)


def _patchify_setup(ctx, inputs, output) -> None:
    pixels, ctx.patch_size, _ = inputs
    ctx.size, ctx.dtype = pixels.shape[2:], pixels.dtype


def _patchify_backward(ctx, grad: Tensor):
    return torch.ops.l2p_fast.unpatchify(grad, ctx.patch_size, *ctx.size, ctx.dtype), None, None


def _unpatchify_setup(ctx, inputs, output) -> None:
    ctx.patch_size, ctx.dtype = inputs[1], inputs[0].dtype


def _unpatchify_backward(ctx, grad: Tensor):
    return torch.ops.l2p_fast.patchify(grad, ctx.patch_size, ctx.dtype), None, None, None, None


torch.library.register_autograd("l2p_fast::patchify", _patchify_backward, setup_context=_patchify_setup)
torch.library.register_autograd("l2p_fast::unpatchify", _unpatchify_backward, setup_context=_unpatchify_setup)


def _check(patch_size: int, height: int, width: int, *dtypes: torch.dtype) -> None:
    if patch_size < 1:
        raise UserError(f"the patch size must be at least 1, got {patch_size}")
    for side, name in ((height, "height"), (width, "width")):
        if side % patch_size:
            nearest = max(1, round(side / patch_size)) * patch_size
            raise UserError(f"{name} must be a multiple of the patch size {patch_size}, got {side}; try {nearest}")
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise UserError(f"patchify takes float32, float64, float16 and bfloat16, got {dtype}; cast before it")


def patchify(pixels: Tensor, patch_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Cut an image into patches, one token each.

    Args:
        pixels: (B, C, H, W), any strides; float32, bfloat16, float16 or float64.
        patch_size: P; H and W are multiples of it.
        dtype: of the tokens; the pixels' own when None.

    Returns:
        (B, h*w, P*P*C), contiguous, tokens in rows from the top left, features ordered (patch row, patch column,
        channel) with the channel fastest: the layout of Z-Image's input embedding.

    Raises:
        UserError: a wrong shape or dtype.
    """
    if pixels.dim() != 4:
        raise UserError(f"pixels must be (B, C, H, W), got {tuple(pixels.shape)}")
    dtype = dtype or pixels.dtype
    _check(patch_size, pixels.shape[2], pixels.shape[3], pixels.dtype, dtype)
    return torch.ops.l2p_fast.patchify(pixels, patch_size, dtype)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Put patches back together: the inverse and the backward of `patchify`.

    Args:
        tokens: (B, h*w, P*P*C), any strides; float32, bfloat16, float16 or float64.
        patch_size: P.
        height, width: H and W in pixels, multiples of P with h*w tokens.
        dtype: of the pixels; the tokens' own when None.

    Returns:
        (B, C, H, W), contiguous.

    Raises:
        UserError: a wrong shape or dtype.
    """
    if tokens.dim() != 3:
        raise UserError(f"tokens must be (B, h*w, P*P*C), got {tuple(tokens.shape)}")
    dtype = dtype or tokens.dtype
    _check(patch_size, height, width, tokens.dtype, dtype)
    count = (height // patch_size) * (width // patch_size)
    if tokens.shape[1] != count or tokens.shape[2] % (patch_size * patch_size):
        raise UserError(
            f"{height} x {width} pixels in patches of {patch_size} are {count} tokens of a multiple of "
            f"{patch_size * patch_size} features, got {tuple(tokens.shape)}"
        )
    return torch.ops.l2p_fast.unpatchify(tokens, patch_size, height, width, dtype)
