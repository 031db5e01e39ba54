"""How clean an image of the small world looks: grain, texture, edges, weave and file size, each beside the renderer's.

The scorer (`scorer`) says whether the right things are there; it reads at 256 px and forgives much. These numbers are
taken at the image's own size, and only where the renderer tells what is right: inside things, along their outlines, and
at the one frequency of the fine weave. Left out: how the paper looks between things.

H x W pixels, values 0 to 255 where a number is a brightness.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image
from scipy import ndimage, optimize

from .scorer import areas, read
from .world import COLORS, TEXTURE_PERIODS, WEAVE, signed_distance

BLOCK = 8  # px of a side of the squares in which grain is measured
WINDOW = 64  # px of a side of the squares in which the weave is measured


def pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) fp32."""
    return np.asarray(image.convert("RGB"), np.float32)


def _squares(values: np.ndarray, inside: np.ndarray, side: int) -> np.ndarray:
    """The whole squares of ``values`` (H, W, 3) that lie ``inside`` (H, W): (n, side * side, 3)."""
    rows, columns = (n // side for n in inside.shape)

    def cut(array: np.ndarray) -> np.ndarray:
        array = array[: rows * side, : columns * side].reshape(rows, side, columns, side, -1)
        return array.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side * side, -1)

    return cut(values)[cut(inside[..., None]).all(axis=(1, 2))]


def inside_things(image: Image.Image, margin: float = 0.02) -> np.ndarray:
    """(H, W) bool: the pixels of things, but those within ``margin`` of the longer side from an outline."""
    found = np.zeros((image.height, image.width), bool)
    for _, mask in areas(image):
        distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] / max(mask.shape)
        grown = Image.fromarray((distance * 60000).astype(np.int32)).resize(image.size, Image.Resampling.BILINEAR)
        found |= np.asarray(grown) > margin * 60000
    return found


def grain(image: Image.Image) -> float:
    """Standard deviation within squares of 8 px inside things: the median square's. NaN where there is none."""
    blocks = _squares(pixels(image), inside_things(image), BLOCK)
    return float(np.median(blocks.std(axis=1).mean(axis=1))) if len(blocks) else float("nan")


def edge_error(image: Image.Image) -> float:
    """Root mean square distance in px of things' outlines from the best-fitting outlines of their shapes.

    Each thing's shape is the one that was read, its place and size are fitted. NaN where nothing was read.
    """
    side, errors = max(image.size), []
    values = pixels(image) / 255
    palette = np.array(list(COLORS.values()), np.float32)
    for thing in read(image):
        if thing.shape == "unknown":
            continue
        reach = 1.3 * thing.size * side
        left, top = (max(0, int(center * side - reach)) for center in (thing.x, thing.y))
        part = values[top : int(thing.y * side + reach) + 1, left : int(thing.x * side + reach) + 1]
        # How much of the paint each pixel holds, between the paper around and the thing's own color.
        paint, paper = palette[list(COLORS).index(thing.color)], np.median(part[[0, -1]].reshape(-1, 3), axis=0)
        cover = (ndimage.gaussian_filter(part, (1, 1, 0)) - paper) @ (paint - paper) / np.square(paint - paper).sum()
        ys, xs = _crossings(cover - 0.5)
        xs, ys = (xs + left + 0.5) / side, (ys + top + 0.5) / side

        def distances(fit: np.ndarray, shape: str = thing.shape, xs: np.ndarray = xs, ys: np.ndarray = ys):
            x, y, size = fit
            return signed_distance(shape, (xs - x) / size, (ys - y) / size) * size * side

        fit = optimize.least_squares(distances, (thing.x, thing.y, thing.size), x_scale=0.01, loss="soft_l1")
        errors.append(np.square(distances(fit.x)))
    return float(np.sqrt(np.concatenate(errors).mean())) if errors else float("nan")


def _crossings(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, to a part of a pixel, at which ``field`` changes sign between neighbors."""
    rows, columns = [], []
    for axis in (0, 1):
        a, b = (field[:-1], field[1:]) if axis == 0 else (field[:, :-1], field[:, 1:])
        y, x = np.nonzero((a < 0) != (b < 0))
        part = a[y, x] / (a[y, x] - b[y, x])
        rows.append(y + part * (axis == 0))
        columns.append(x + part * (axis == 1))
    return np.concatenate(rows), np.concatenate(columns)


def _spectrum(image: Image.Image) -> np.ndarray | None:
    """Mean power spectrum of the squares of 64 px inside things, rows by columns; None: there is no whole square."""
    squares = _squares(pixels(image).mean(axis=2, keepdims=True), inside_things(image), WINDOW)
    if not len(squares):
        return None
    return np.square(np.abs(np.fft.fft2(squares.reshape(-1, WINDOW, WINDOW)))).mean(axis=0)


def weave(image: Image.Image) -> float:
    """Amplitude of the finest weave inside things, as a share of what the renderer paints. NaN without a whole square.

    It is the peak of the spectrum at the wave's own frequency and diagonal, less what the spectrum around it holds:
    grain, or a wave of another direction, counts nothing. The wave's phase is free.
    """
    side = max(image.size)
    periods = TEXTURE_PERIODS[-1] * WINDOW / side  # in a square, along each side
    if periods != round(periods) or periods >= WINDOW / 2:
        raise ValueError(f"the weave needs an image of {TEXTURE_PERIODS[-1] * WINDOW} px or a whole part, got {side}")
    power = _spectrum(image)
    if power is None:
        return float("nan")
    peak, reach = int(periods), np.arange(int(periods) - 2, int(periods) + 3)
    around = power[np.ix_(reach, reach)]
    floor = (around.sum() - power[peak, peak]) / (around.size - 1)
    return float(2 * np.sqrt(max(power[peak, peak] - floor, 0)) / WINDOW**2 / (255 * WEAVE))


def direction(image: Image.Image) -> float:
    """How far the texture inside things runs along the weave's diagonal: 1 all, 0 no direction, -1 all across it.

    The power of waves of 4 to 32 px in the two quadrants of the spectrum. NaN without a whole square.
    """
    power = _spectrum(image)
    if power is None:
        return float("nan")
    bins = np.arange(WINDOW // 32, WINDOW // 4 + 1)
    along, across = power[np.ix_(bins, bins)].sum(), power[np.ix_(bins, -bins)].sum()
    return float((along - across) / max(along + across, 1e-9))


def png_megabytes(image: Image.Image) -> float:
    file = io.BytesIO()
    image.save(file, "png")
    return file.tell() / 1e6


def mean(numbers: Iterable[float]) -> float:
    """Of those that are numbers; NaN of none."""
    known = [number for number in numbers if not np.isnan(number)]
    return float(np.mean(known)) if known else float("nan")
