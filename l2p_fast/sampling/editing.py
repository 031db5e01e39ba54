"""Images to start from, and what of them an edit keeps while the rest is drawn.

A pixel's mask m, a byte, is its strength: of the N steps of a run it is drawn in the last m / 255 * N, and before that
it is the image's own at the noise level of each step, always with the same noise. That noise is held nowhere: a kept
pixel moves from sigma to sigma' by x0 + sigma' / sigma * (x - x0), which is the flow's own line, and ends at exactly x0
when sigma' = 0. All of it runs in bands of rows, so the image is held once, as bytes, and the state once.

Letters: B images, H x W pixels; an image or a mask for all of them may have B = 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from . import flow
from .pixels import image_to_tensor, mask_to_tensor, to_float

logger = logging.getLogger(__name__)

_BAND_PIXELS = 1 << 20  # pixels of a band of rows


def bands(size: Sequence[int]) -> Iterator[slice]:
    """Rows of (..., H, W), band by band."""
    height, width = size[-2:]
    rows = max(1, _BAND_PIXELS // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


@dataclass(frozen=True)
class Source:
    """An image to start from.

    Attributes:
        pixels: (B, 3, H, W), bytes or fp32 in [-1, 1].
        mask: (B, 1, H, W) bytes, the strength of each pixel; None: all are drawn from the first step.
    """

    pixels: Tensor
    mask: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """(B, 3, h, W) fp32 in [-1, 1]."""
        return to_float(self.pixels[:, :, rows])

    def to(self, device: torch.device) -> Source:
        """On ``device``."""
        return replace(self, pixels=self.pixels.to(device), mask=None if self.mask is None else self.mask.to(device))

    def resized(self, height: int, width: int) -> Source:
        """Made smaller to ``height`` x ``width``, mask and all."""

        def resize(x: Tensor) -> Tensor:
            return F.interpolate(x, (height, width), mode="bilinear", antialias=True)

        return Source(resize(self.pixels), None if self.mask is None else resize(self.mask))

    def noised_(self, noise: Tensor, sigma: float) -> Tensor:
        """The state at ``sigma``, (B, 3, H, W) fp32, written over ``noise``."""
        for rows in bands(noise.shape):
            noise[:, :, rows] = flow.add_noise(self.rows(rows), noise[:, :, rows], sigma)
        return noise


@dataclass(frozen=True)
class Kept:
    """The pixels of a run that are not drawn yet, or never.

    Attributes:
        source: with a mask, where the run is.
        begin, steps: the first step that strength 255 is drawn in, and how many the schedule has.
    """

    source: Source
    begin: int
    steps: int

    def to(self, device: torch.device) -> Kept:
        """On ``device``."""
        return replace(self, source=self.source.to(device))

    def resized(self, height: int, width: int) -> Kept:
        """Of the image made smaller to ``height`` x ``width``."""
        return replace(self, source=self.source.resized(height, width))

    def drawn(self, rows: slice, step: int) -> Tensor:
        """(B, 1, h, W): which pixels are drawn in ``step``."""
        left, whole = self.steps - 1 - step, self.steps - self.begin
        return self.source.mask[:, :, rows] > 255 * left // whole

    def after(self, state: Tensor, rows: slice, ratio: float) -> Tensor:
        """(B, 3, h, W): kept pixels after a step from ``state`` that takes the noise level to ``ratio`` of itself."""
        return torch.lerp(self.source.rows(rows), state[:, :, rows], ratio)

    def put_(self, state: Tensor, pixels: Tensor, rows: slice, step: int) -> None:
        """``pixels`` into the rows of ``state`` where they are kept in ``step``."""
        band = state[:, :, rows]
        band.copy_(torch.where(self.drawn(rows, step), band, pixels))

    def put_source_(self, state: Tensor, step: int) -> Tensor:
        """The image's own values into ``state`` where they are kept in ``step``."""
        for rows in bands(state.shape):
            self.put_(state, self.source.rows(rows), rows, step)
        return state


def make_source(images: Sequence[Any], size: tuple[int, int]) -> Source:
    """Images of any form, resized to ``size`` (height, width)."""
    return Source(_together([image_to_tensor(image, *size) for image in images]))


def make_kept_source(
    images: Sequence[Any], masks: Sequence[Any], margins: Sequence[int], size: tuple[int, int], blend: int
) -> Source:
    """Images of any form, as large as they are, and what of them is drawn.

    Args:
        masks: of the images; none: all of them is kept.
        margins: left, top, right and bottom: pixels to add, which are drawn. Before that they continue the outermost.
        size: (height, width) of the canvas; what is left of it at the right and the bottom is like a margin.
        blend: see `feathered`.

    Raises:
        UserError: images of several sizes, or a mask that isn't one.
    """
    pixels = _together([image_to_tensor(image) for image in images])
    height, width = pixels.shape[-2:]
    left, top = margins[:2]
    mask = torch.full((max(1, len(masks)), 1, *size), 255, dtype=torch.uint8)
    inner = mask[:, :, top : top + height, left : left + width].zero_()
    if masks:
        inner.copy_(torch.cat([mask_to_tensor(one, height, width) for one in masks]))
    for axis, before, length, own in ((2, top, size[0], height), (3, left, size[1], width)):
        if own != length:
            places = torch.arange(-before, length - before, device=pixels.device)
            pixels = pixels.index_select(axis, places.clamp_(0, own - 1))
    soft = feathered(mask, blend)
    if soft.max() < mask.max():
        logger.warning(
            "nothing to be drawn is wider than %d pixels, so all of it keeps something of the image; "
            "widen the mask, or blend over fewer pixels",
            2 * blend,
        )
    return Source(pixels, soft)


def _together(images: Sequence[Tensor]) -> Tensor:
    if any(image.shape != images[0].shape for image in images):
        raise UserError("image: wanted images of one size where a part of them is kept; draw them one by one")
    if any(image.dtype != images[0].dtype for image in images):
        images = [to_float(image) for image in images]
    return torch.cat(list(images)).contiguous()  # planar, as the state is


def feathered(mask: Tensor, width: int) -> Tensor:
    """A mask (B, 1, H, W) of bytes, falling to the edges of what is kept (0) within ``width`` pixels.

    A pixel d pixels from the nearest one that is kept (the larger of rows and columns counts) is weighed by
    d / (width + 1). What is kept stays so, and what isn't stays at least 1.
    """
    inside = (mask > 0).byte()
    if not width or inside.all():
        return mask
    depth = inside.short()
    for _ in range(width):
        inside = _eroded(_eroded(inside, 2), 3)
        depth += inside
        if not inside.any():
            break
    out = torch.empty_like(mask)
    for rows in bands(mask.shape):
        weighed = mask[:, :, rows].int() * depth[:, :, rows] + width
        out[:, :, rows] = weighed.div_(width + 1, rounding_mode="floor")
    return out


def _eroded(inside: Tensor, axis: int) -> Tensor:
    """The least of each pixel and its two neighbors along ``axis``."""
    out, length = inside.clone(), inside.shape[axis] - 1
    before, after = inside.narrow(axis, 0, length), inside.narrow(axis, 1, length)
    for part, other in ((out.narrow(axis, 1, length), before), (out.narrow(axis, 0, length), after)):
        torch.minimum(part, other, out=part)
    return out
