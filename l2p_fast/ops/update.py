"""The sampler's update and the final image, each in one pass over the fp32 state.

Why ops: at 10240 px the state is 1.26 GB, and plain PyTorch crosses memory once for each sign, difference, product, sum
and cast. Every operation is rounded as PyTorch rounds it, so images are the same with kernels and without. No
gradients: both are for sampling. Left out: samplers of higher order.

Letters: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

_STEP = "Tensor raw, float dt, Tensor? negative, float guidance"
torch.library.define("l2p_fast::euler_step", f"(Tensor x, {_STEP}) -> Tensor")
torch.library.define("l2p_fast::euler_step_", f"(Tensor(a!) x, {_STEP}) -> ()")
torch.library.define("l2p_fast::to_uint8", "(Tensor pixels) -> Tensor")


def euler_step_reference(
    x: Tensor, raw: Tensor, dt: float, negative: Tensor | None = None, guidance: float = 1.0
) -> Tensor:
    """`euler_step` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    v = -raw.float()
    if negative is not None:
        v_negative = -negative.float()
        v = v_negative + guidance * (v - v_negative)
    return (x + dt * v).contiguous()


def to_uint8_reference(pixels: Tensor) -> Tensor:
    """`to_uint8` in plain PyTorch: its specification, and what runs where no kernel was compiled."""
    # One image at a time and in place: a 10K image is 1.2 GB in fp32.
    out = pixels.new_empty((len(pixels), *pixels.shape[2:], pixels.shape[1]), dtype=torch.uint8)
    for one, image in zip(out, pixels, strict=True):
        one.copy_(image.mul(127.5).add_(127.5).round_().clamp_(0, 255).permute(1, 2, 0))
    return out


@torch.library.impl("l2p_fast::euler_step_", "CompositeExplicitAutograd")
def _euler_step_in_place(x: Tensor, *args) -> None:
    x.copy_(euler_step_reference(x, *args))


torch.library.impl("l2p_fast::euler_step", "CompositeExplicitAutograd")(euler_step_reference)
torch.library.impl("l2p_fast::to_uint8", "CompositeExplicitAutograd")(to_uint8_reference)


@torch.library.register_fake("l2p_fast::euler_step")
def _euler_step_fake(x: Tensor, raw: Tensor, dt: float, negative: Tensor | None, guidance: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("l2p_fast::euler_step_")
def _euler_step_in_place_fake(x: Tensor, raw: Tensor, dt: float, negative: Tensor | None, guidance: float) -> None:
    return None


@torch.library.register_fake("l2p_fast::to_uint8")
def _to_uint8_fake(pixels: Tensor) -> Tensor:
    return pixels.new_empty((pixels.shape[0], *pixels.shape[2:], pixels.shape[1]), dtype=torch.uint8)


def euler_step(x: Tensor, raw: Tensor, dt: float, negative: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    """The state one step on: x + dt * v, where v = -raw, guided v_negative + guidance * (v - v_negative).

    Args:
        x: (B, C, H, W) fp32, any strides.
        raw: (B, C, H, W), the network's x0 - eps for the prompt; any floating dtype and strides.
        dt: sigma_next - sigma.
        negative: as ``raw``, for the negative prompt; None: no guidance.
        guidance: scale in its usual meaning, 1 is none.

    Returns:
        (B, C, H, W) fp32, contiguous.

    Raises:
        UserError: a wrong shape or dtype.
    """
    _check(x, raw, negative)
    return torch.ops.l2p_fast.euler_step(x, raw, dt, negative, guidance)


def euler_step_(x: Tensor, raw: Tensor, dt: float, negative: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    """`euler_step` in place: no second state in memory. Returns ``x``."""
    _check(x, raw, negative)
    torch.ops.l2p_fast.euler_step_(x, raw, dt, negative, guidance)
    return x


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) in [-1, 1], any strides, as bytes (B, H, W, C): clamped, scaled, rounded to the nearest.

    Raises:
        UserError: a wrong shape or dtype.
    """
    if pixels.ndim != 4 or pixels.dtype != torch.float32:
        raise UserError(f"pixels must be (B, C, H, W) in float32, got {tuple(pixels.shape)} in {pixels.dtype}")
    return torch.ops.l2p_fast.to_uint8(pixels)


def _check(x: Tensor, raw: Tensor, negative: Tensor | None) -> None:
    if x.ndim != 4 or x.dtype != torch.float32:
        raise UserError(f"the state must be (B, C, H, W) in float32, got {tuple(x.shape)} in {x.dtype}")
    for half in (raw, raw if negative is None else negative):
        if half.shape != x.shape or not half.is_floating_point() or half.dtype != raw.dtype:
            raise UserError(
                f"predictions must be {tuple(x.shape)} like the state, of one floating dtype, "
                f"got {tuple(half.shape)} in {half.dtype}"
            )
