"""Read a picture of the small world back: which shapes, of which colour, how many and where.

Pixels are given to the nearest colour of the palette, connected areas become things, and a thing's shape is the
outline it overlaps most. `matches` is strict: a picture must show what its prompt asks for and nothing else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy import ndimage

from .world import COLORS, PAPER, SHAPES, Prompt, Thing, relation_holds, signed_distance

SIDE = 256  # pictures are read at this longer side
MIN_AREA = 0.003  # of the longer side squared; smaller spots are not things
MIN_OVERLAP = 0.7  # intersection over union with the outline


@functools.cache
def _templates(side: int = 48) -> dict[str, np.ndarray]:
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    masks = {shape: signed_distance(shape, axis[None], axis[:, None]) < 0 for shape in SHAPES}
    return {shape: _normalize(mask) for shape, mask in masks.items()}


def _normalize(mask: np.ndarray, side: int = 32) -> np.ndarray:
    """Fit a mask's bounding box into a square of ``side``, aspect kept, centred."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    mask = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    pad = max(mask.shape) - np.array(mask.shape)
    mask = np.pad(mask, [(p // 2, p - p // 2) for p in pad])
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.BILINEAR)) > 127


def areas(image: np.ndarray | Image.Image) -> Iterator[tuple[str, np.ndarray]]:
    """(color, bool mask) of each connected area of one color, at `SIDE` px of the longer side."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(((np.moveaxis(image, 0, 2) + 1) * 127.5).clip(0, 255).round().astype(np.uint8))
    scale = SIDE / max(image.size)
    size = [max(1, round(s * scale)) for s in image.size]
    rgb = np.asarray(image.convert("RGB").resize(size, Image.BOX if scale < 1 else Image.BILINEAR), np.float32) / 255
    palette = np.array([PAPER, *COLORS.values()], np.float32)
    nearest = np.square(rgb[:, :, None] - palette).sum(-1).argmin(-1)
    for index, color in enumerate(COLORS, start=1):
        # Opening drops the thin fringes where a blend of two colors comes near a third.
        labels, count = ndimage.label(ndimage.binary_opening(nearest == index, np.ones((3, 3))))
        for area in range(1, count + 1):
            mask = labels == area
            if mask.sum() >= MIN_AREA * SIDE**2:
                yield color, mask


def read(image: np.ndarray | Image.Image) -> list[Thing]:
    """The things in an image.

    Args:
        image: a PIL image, or an array (3, H, W) in [-1, 1].

    Returns:
        Things in units of the longer side. An area that is like no outline has the shape "unknown".
    """
    things = []
    for color, mask in areas(image):
        outline = _normalize(mask)
        overlap = {s: (outline & t).sum() / (outline | t).sum() for s, t in _templates().items()}
        shape = max(overlap, key=overlap.get)
        rows, cols = np.nonzero(mask)
        middle = np.array([cols.min() + cols.max() + 1, rows.min() + rows.max() + 1]) / 2 / SIDE
        extent = max(np.ptp(rows), np.ptp(cols)) / 2 / SIDE
        things.append(Thing(shape if overlap[shape] >= MIN_OVERLAP else "unknown", color, *middle, extent))
    return things


def matches(prompt: Prompt, things: list[Thing]) -> bool:
    """Whether ``things`` are exactly what ``prompt`` asks for: shapes, counts, colours and relation."""
    if len(things) != sum(group.count for group in prompt.groups):
        return False
    for order in itertools.permutations(things) if len(prompt.groups) > 1 else [things]:
        rest, placed = list(order), []
        for group in prompt.groups:
            members, rest = rest[: group.count], rest[group.count :]
            if any(t.shape != group.shape or (group.color and t.color != group.color) for t in members):
                break
            placed.append(np.array([(t.x, t.y) for t in members]))
        else:
            if prompt.relation is None or relation_holds(prompt.relation, *placed):
                return True
    return False
