"""The start of a pixel model out of a latent one, or of an L2P model of another size: what is copied, what is new."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError, few
from .checkpoint import Checkpoint
from .shapes import Shapes

if TYPE_CHECKING:
    import torch

    from .write import Piece


@dataclass
class Initial:
    """Our keys of a pixel model to be made of ``source``, in the shapes ``wanted``.

    Attributes:
        copied: those that match by name and shape.
        new: those that are drawn.
        skipped: those of the source that have no place.
    """

    source: Checkpoint
    wanted: Shapes
    copied: list[str]
    new: list[str]
    skipped: list[str]

    def pieces(self, seed: int, dtype: torch.dtype | None) -> dict[str, Piece]:
        """What is written: the copied ones in ``dtype`` (None: their own), the new ones drawn from ``seed``."""
        from .write import Piece

        pieces = {key: Piece.of_checkpoint(self.source, key, dtype) for key in self.copied}
        for key in self.new:
            weight = key.removesuffix("bias") + "weight" if key.endswith(".bias") else key
            fan_in = math.prod(self.wanted[weight][1:])
            pieces[key] = Piece.of_init(key, self.wanted[key], fan_in, seed, dtype or self.source.default_dtype)
        return pieces


def initial(source: Checkpoint, patch: int, head_width: float | None) -> Initial:
    """What a pixel model of ``patch`` takes over from ``source``.

    Args:
        head_width: multiplier of the head's channels; None: the source's, else 1.

    Raises:
        UserError: another kind of checkpoint, or one whose body isn't whole.
    """
    source.demand("latent", "l2p")
    found = source.model_config()
    width = found.get("head_width", 1.0) if head_width is None else head_width
    wanted, shapes = source.layout.shapes(source.layout.in_pixels(found, patch, width)), source.shapes
    copied = [key for key in wanted if shapes.get(key) == wanted[key]]
    new = [key for key in wanted if key not in set(copied)]
    lost = [key for key in new if not key.startswith(source.layout.pixel_parts)]
    if lost:
        raise UserError(f"{source.path} lacks {len(lost)} tensors of the body ({few(lost)}); the file is incomplete")
    return Initial(source, wanted, copied, new, [key for key in shapes if shapes[key] != wanted.get(key)])
