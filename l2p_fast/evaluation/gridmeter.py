"""The patch-grid meter: does the grid of patches show in an image?

A pair of neighboring pixels lies on a border when the two belong to different patches. The meter compares the energy
of the differences (their mean square) of the pairs on borders with that of all other pairs, over rows and columns
together. A ratio of 1 says that the grid does not show. Outlines of things weigh most in it, and fall on borders or not
by chance, so it scatters from image to image; over smooth pairs alone it is steady, and that is where a grid is seen.

p is the period of the grid in pixels: the patch size, or that of whatever else is suspected to show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

CHANNELS = ("red", "green", "blue")
DARK = 64 / 255  # a pair is dark when the luma of both pixels is below
SMOOTH = 16 / 255  # a pair is smooth when no channel differs by more: there a faint grid is seen
LEAST_PAIRS = 100  # fewer pairs on borders, or elsewhere, say nothing
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
BAND = 512  # rows at a time: an image of 10,240 px is no reason for many GB


@dataclass(frozen=True)
class Grid:
    """What the meter reads of one image; None where it has too few such pairs, or no differences.

    Attributes:
        ratio: energy on borders over energy elsewhere, of all channels.
        channels: the same for red, green and blue.
        dark: over pairs of dark pixels; ``smooth``: over smooth pairs.
        step: root of the energy that borders have beyond the rest, of 255: how high the visible step is.
    """

    ratio: float | None
    channels: tuple[float | None, ...]
    dark: float | None
    smooth: float | None
    step: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The readings by name."""
        named = dict(zip(CHANNELS, self.channels, strict=True))
        return {"grid": self.ratio, **named, "dark": self.dark, "smooth": self.smooth, "step": self.step}


def measure_grid(pixels: Tensor, period: int) -> Grid:
    """The grid of period p = ``period`` in one image.

    Args:
        pixels: (3, H, W), bytes, or floats in [0, 1].
        period: in pixels, at least 2.

    Raises:
        UserError: an image without a border or without anything else.
    """
    if period < 2 or max(pixels.shape[-2:]) <= period:
        height, width = pixels.shape[-2:]
        raise UserError(f"a grid of {period} px does not show in an image of {width} x {height}; choose another period")
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    luma = torch.einsum("chw,c->hw", pixels, pixels.new_tensor(_LUMA))
    # Sums and counts: [channel, or channels as one][on borders, elsewhere]
    kinds = {"all": _Sums(), "dark": _Sums(), "smooth": _Sums()}
    for differences, dark, border in _pairs(pixels, luma, period):
        squares = differences.square().double()
        smooth = differences.abs().amax(0) <= SMOOTH
        for kind, chosen in (("all", None), ("dark", dark), ("smooth", smooth)):
            kinds[kind].add(squares, border, chosen)
    every = kinds["all"]
    on, off = every.energy()
    return Grid(
        every.ratio(),
        tuple(every.ratio(channel) for channel in range(3)),
        kinds["dark"].ratio(),
        kinds["smooth"].ratio(),
        None if every.ratio() is None else 255 * math.sqrt(max(0.0, on - off)),
    )


def _pairs(pixels: Tensor, luma: Tensor, period: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Band by band: differences (3, n, m), whether both pixels are dark (n, m), whether on a border (n, m)."""
    height, width = luma.shape
    columns = torch.arange(1, width, device=pixels.device) % period == 0
    for top in range(0, height, BAND):
        rows = slice(top, min(top + BAND, height))
        darker = luma[rows] < DARK
        yield pixels[:, rows].diff(dim=2), darker[:, 1:] & darker[:, :-1], columns.expand(len(darker), -1)
        rows = slice(top, min(top + BAND + 1, height))  # the band below begins with this one's last row
        darker = luma[rows] < DARK
        border = torch.arange(top + 1, rows.stop, device=pixels.device) % period == 0
        yield pixels[:, rows].diff(dim=1), darker[1:] & darker[:-1], border[:, None].expand(-1, width)


class _Sums:
    """Energies on borders and elsewhere, by channel."""

    def __init__(self):
        self.sums, self.counts = torch.zeros(2, 3, dtype=torch.float64), [0, 0]

    def add(self, squares: Tensor, border: Tensor, chosen: Tensor | None) -> None:
        for place, where in enumerate((border, ~border)):
            where = where if chosen is None else where & chosen
            self.sums[place] += (squares * where).sum(dim=(1, 2)).cpu()
            self.counts[place] += int(where.sum())

    def energy(self, channel: int | None = None) -> tuple[float, float]:
        """Mean squares on borders and elsewhere."""
        sums = self.sums.mean(dim=1) if channel is None else self.sums[:, channel]
        return tuple(total.item() / max(1, count) for total, count in zip(sums, self.counts, strict=True))

    def ratio(self, channel: int | None = None) -> float | None:
        on, off = self.energy(channel)
        return on / off if min(self.counts) >= LEAST_PAIRS and off > 0 else None
