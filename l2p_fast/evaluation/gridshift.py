"""A remedy for a visible patch grid, to be tried: the grid lies elsewhere at every step, so no border is always one.

The transformer sees the state moved by a part of a patch, and its output is moved back. What leaves the image is
handled in one of two ways:

- ``roll``: it comes in at the other side. Costs nothing, but the patches at the rim mix opposite sides.
- ``pad``: the state is continued by its mirror image, one unit longer and wider, and the answer is cut out. Costs the
  tokens of a row and a column.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEPS = (0.7548776662466927, 0.5698402909980532)  # the plane's most even sequence: powers of 1 / the plastic number


def offset(step: int, unit: int) -> tuple[int, int]:
    """How far the state is moved at a step, in pixels down and right: evenly over half a unit to either side.

    The mean is 0, or else the things in the image would move, too.
    """
    return tuple(round(((step * share + 0.5) % 1 - 0.5) * (unit - 1)) for share in _STEPS)


class ShiftedGrid(nn.Module):
    """A transformer as the sampler takes it, whose patch grid is moved at every step.

    Args:
        transformer: an `L2PTransformer2DModel`.
        way: ``roll`` or ``pad``.
    """

    def __init__(self, transformer: nn.Module, way: str):
        super().__init__()
        self.__dict__["inner"], self.way = transformer, way  # not as a child: its parameters stay its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def prepare(self, cap_feats: list[Tensor], height: int, width: int, **options: Any) -> Any:
        more = self.inner.size_multiple if self.way == "pad" else 0
        return self.inner.prepare(cap_feats, height + more, width + more, **options)

    def forward(self, pixels: Tensor, t: Tensor, *, cond: Any, step: int) -> Tensor:
        """Raw output (B, 3, H, W) at the state ``pixels`` (B, 3, H, W)."""
        unit, (height, width) = self.inner.size_multiple, pixels.shape[-2:]
        if self.way == "roll":
            down, right = offset(step, self.inner.patch_size)
            raw = self.inner(torch.roll(pixels, (down, right), (2, 3)), t, cond=cond, step=step)
            return torch.roll(raw, (-down, -right), (2, 3))
        down, right = (unit // 2 + moved for moved in offset(step, unit))
        mode = "reflect" if unit < min(height, width) else "circular" if unit <= min(height, width) else "replicate"
        moved = F.pad(pixels, (right, unit - right, down, unit - down), mode=mode)
        raw = self.inner(moved, t, cond=cond, step=step)
        return raw[..., down : down + height, right : right + width]
