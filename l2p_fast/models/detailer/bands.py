"""The outer levels of the Detailer Head in bands of rows: which rows a band needs, how large it may be, what it takes.

One sweep encodes band by band and keeps only what the outer levels have pooled, the inner levels run whole, and a
second sweep decodes band by band and computes the outer skips anew instead of storing them. Each band carries the rows
that its convolutions reach into, so the result is that of the whole image. Under autograd each band is a checkpoint, so
training memory is banded too. Left out: bands of columns.

B batch, C channels, H x W pixels. Level 0 is the outermost: full resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...variants import Level

_IMAGE_CHANNELS = 16  # of which the CUDA kernel makes the image without storing them: kImageChannels in csrc/head.h
NEAR = 32 << 20  # bytes


class Rows(NamedTuple):
    """Rows [start, stop) of an image of ``height`` rows."""

    start: int
    stop: int
    height: int

    @classmethod
    def whole(cls, x: Tensor) -> Rows:
        """All rows of ``x`` (B, C, H, W)."""
        return cls(0, x.shape[2], x.shape[2])

    def grow(self, rows: int) -> Rows:
        return self._replace(start=max(self.start - rows, 0), stop=min(self.stop + rows, self.height))

    def pooled(self) -> Rows:
        """The rows of the half-size image that cover these."""
        return Rows(self.start // 2, -(-self.stop // 2), self.height // 2)

    def doubled(self) -> Rows:
        return Rows(2 * self.start, 2 * self.stop, 2 * self.height)

    def union(self, other: Rows) -> Rows:
        return self._replace(start=min(self.start, other.start), stop=max(self.stop, other.stop))

    def of(self, x: Tensor, held: Rows) -> Tensor:
        """These rows of ``x`` (B, C, rows, W), which holds the rows ``held``."""
        return x[:, :, self.start - held.start : self.stop - held.start]


class Plan(NamedTuple):
    """The outer ``levels`` levels run in bands of ``rows`` rows at full resolution."""

    levels: int
    rows: int


class Run(Protocol):
    """How one level is computed for a band of rows; feature maps are (B, C, rows, W) and hold the rows ``held``."""

    def encode(
        self, k: int, x: Tensor, held: Rows, rows: Rows, keep: bool = True, pool: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Level ``k`` of the encoder: ``rows`` of its output, and what is pooled from them.

        Without ``keep`` or ``pool`` the one or the other may be left out.
        """

    def bottleneck(self, x: Tensor, features: Tensor) -> Tensor:
        """What lies between encoder and decoder: x (B, C, H, W), features (B, D, h, w) -> (B, out, H, W)."""

    def decode(self, k: int, x: Tensor, held: Rows, skip: Tensor, skip_held: Rows, rows: Rows) -> Tensor:
        """``rows`` of level ``k`` of the decoder, from the next inner level's output; of level 0, of the image."""


# --- Running a band --------------------------------------------------------------------------------------------------
def encode_band(run: Run, pixels: Tensor, rows: Rows, banded: int) -> Tensor:
    """``rows`` of the image after the outer ``banded`` levels and their pools."""
    wanted = [rows.doubled()]
    for _ in range(banded - 1):
        wanted.insert(0, wanted[0].grow(1).doubled())
    x, held = pixels, Rows.whole(pixels)
    for k, level_rows in enumerate(wanted):
        _, x = run.encode(k, x, held, level_rows, keep=False)
        held = level_rows.pooled()
    return x


def decode_band(run: Run, pixels: Tensor, inner: Tensor, rows: Rows, banded: int) -> Tensor:
    """``rows`` of the result, from the decoded features of level ``banded`` and skips computed anew."""
    decoded, encoded = _decoder_rows(rows, banded)
    skips, x, held = [], pixels, Rows.whole(pixels)
    for k, level_rows in enumerate(encoded):
        skip, x = run.encode(k, x, held, level_rows, pool=k < banded - 1)
        held = level_rows.pooled()
        skips.append(skip)
    x, held = inner, Rows.whole(inner)
    for k in range(banded - 1, -1, -1):
        x = run.decode(k, x, held, skips.pop(), encoded[k], decoded[k])
        held = decoded[k]
    return x


def sweep(
    band: Callable[..., Tensor], inputs: Sequence[Tensor], rows: int, height: int, order: torch.memory_format
) -> Tensor:
    """Run ``band(*sample, start, stop)`` over all samples and bands of ``rows`` rows; -> (B, C, height, W)."""
    batch = inputs[0].shape[0]
    spans = [(start, min(start + rows, height)) for start in range(0, height, rows)]
    if torch.is_grad_enabled():
        samples = []
        for i in range(batch):
            sample = [x[i : i + 1] for x in inputs]
            bands = [checkpoint(band, *sample, *span, use_reentrant=False, preserve_rng_state=False) for span in spans]
            samples.append(torch.cat(bands, dim=2))
        return torch.cat(samples)
    result = None
    for i in range(batch):
        sample = [x[i : i + 1] for x in inputs]
        for start, stop in spans:
            out = band(*sample, start, stop)
            if result is None:
                shape = (batch, out.shape[1], height, out.shape[3])
                result = torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=order)
            result[i : i + 1, :, start:stop] = out
    return result


def _decoder_rows(rows: Rows, banded: int) -> tuple[list[Rows], list[Rows]]:
    """What ``rows`` of the result need: rows of the decoder's output at levels 0 to ``banded``, of the encoder's."""
    decoded = [rows]
    for _ in range(banded):
        decoded.append(decoded[-1].grow(2).pooled())  # two convolutions, then the half size
    encoded = [r.grow(1) for r in decoded[:banded]]  # as skips ...
    for k in range(banded - 1, 0, -1):  # ... and as the source of the next level's
        encoded[k - 1] = encoded[k - 1].union(encoded[k].grow(1).doubled())
    return decoded, encoded


# --- Memory ----------------------------------------------------------------------------------------------------------
# Of all that follows, ``levels`` are the head's from the outermost on, of which kernels run the first ``fused``
# (`fused.Kernels`), and the bytes are a forward pass's or, with gradients enabled, what a backward pass needs.


def choose(
    levels: Sequence[Level],
    fewest: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    budget: int,
    fused: int = 0,
    elements: int | None = None,
) -> Plan | None:
    """How a batch of ``shape`` (B, H, W) is run within ``budget`` bytes; None: whole.

    What fits runs whole (by kernels in float32: what stays near the processor); else ``fewest`` levels are banded, or
    more, until the inner ones fit too. If nothing fits, the least demanding way is taken. No map that is held has
    ``elements`` or more.
    """
    batch, height, width = shape
    per_pixel = max(max(level.enc, level.up, level.dec) / 4**k for k, level in enumerate(levels))
    small = elements is None or batch * height * width * per_pixel < elements
    limit = 2 * _near(dtype, budget, fused) if _is_wide(dtype, fused) else budget
    if small and whole_bytes(levels, shape, dtype, fused) <= limit:
        return None
    best, least = None, 0
    for banded in range(fewest, len(levels)):
        rows = _rows_within(levels[:banded], width, dtype, budget, fused)
        if elements is not None:
            step, most = 2**banded, int((elements - 1) / (width * per_pixel)) - 2 * _halo(banded)
            rows = min(rows, height, max(most // step, 1) * step)
        plan = Plan(banded, rows)
        needed = max(_inner_bytes(levels, banded, shape, dtype, fused), _band_bytes(levels, plan, shape, dtype, fused))
        if best is None or needed < least:
            best, least = plan, needed
        if needed <= budget:
            break
    return best


def peak_bytes(
    levels: Sequence[Level], plan: Plan | None, shape: tuple[int, int, int], dtype: torch.dtype, fused: int = 0
) -> int:
    """Peak bytes of running a batch of ``shape`` (B, H, W) by ``plan``, beside the head's input and output."""
    if plan is None:
        return whole_bytes(levels, shape, dtype, fused)
    inner, band = _inner_bytes(levels, plan.levels, shape, dtype, fused), _band_bytes(levels, plan, shape, dtype, fused)
    batch, height, width = shape
    pooled = batch * (height >> plan.levels) * (width >> plan.levels) * dtype.itemsize
    source, result = pooled * levels[plan.levels - 1].enc, pooled * levels[plan.levels].dec
    if torch.is_grad_enabled():
        return 2 * (source + result) + inner + band  # both with their gradients
    return max(source + inner, result + band)


def whole_bytes(levels: Sequence[Level], shape: tuple[int, int, int], dtype: torch.dtype, fused: int = 0) -> int:
    """Peak bytes of ``levels``, run whole on a batch of ``shape`` (B, H, W) at the first one's size."""
    batch, height, width = shape
    areas = [batch * (height >> k) * (width >> k) for k in range(len(levels))]
    if 0 < fused < len(levels) and not torch.is_grad_enabled():
        return dtype.itemsize * _most_held(levels, areas, fused)
    return _peak(levels, areas, areas, dtype, fused)


def _inner_bytes(
    levels: Sequence[Level], banded: int, shape: tuple[int, int, int], dtype: torch.dtype, fused: int
) -> int:
    batch, height, width = shape
    return whole_bytes(levels[banded:], (batch, height >> banded, width >> banded), dtype, fused - banded)


def _band_bytes(
    levels: Sequence[Level], plan: Plan, shape: tuple[int, int, int], dtype: torch.dtype, fused: int
) -> int:
    return band_bytes(levels[: plan.levels], plan.rows, shape[2], dtype, fused)


def band_bytes(levels: Sequence[Level], rows: int, width: int, dtype: torch.dtype, fused: int = 0) -> int:
    """Peak bytes of decoding a band of ``rows`` rows through ``levels``, far from the image's edges."""
    start = 2**20
    decoded, encoded = _decoder_rows(Rows(start, start + rows, 2 * start + rows), len(levels))
    areas = [[(r.stop - r.start) * (width >> k) for k, r in enumerate(held)] for held in (encoded, decoded[:-1])]
    return _peak(levels, *areas, dtype, fused)


def _rows_within(levels: Sequence[Level], width: int, dtype: torch.dtype, budget: int, fused: int) -> int:
    """Rows of a band through ``levels``: what stays near the processor; up to twice the halo (in float32 by kernels
    four times) where the budget allows, and never less than the halo, else most work is done several times."""
    step = 2 ** len(levels)
    halo = -(-_halo(len(levels)) // step) * step
    fixed = band_bytes(levels, 0, width, dtype, fused)  # what the halo takes
    per_step = band_bytes(levels, step, width, dtype, fused) - fixed
    small, large = ((limit - fixed) // per_step * step for limit in (_near(dtype, budget, fused), budget))
    return max(halo, small, min(large, (4 if _is_wide(dtype, fused) else 2) * halo))


def _is_wide(dtype: torch.dtype, fused: int) -> bool:
    return bool(fused) and dtype == torch.float32


def _near(dtype: torch.dtype, budget: int, fused: int) -> int:
    """Bytes of a band that stays near the processor, which is the faster: a quarter of the budget; half of it for fused
    levels, which cross memory less often; in float32 no more than a CPU's last cache, and than what its allocator
    keeps instead of taking zeroed pages from the system again."""
    if _is_wide(dtype, fused):
        return min(NEAR, budget // 4)
    return budget // (2 if fused else 4)


def _halo(banded: int) -> int:
    """Rows of the image that a decoded band reads beyond each of its edges."""
    step = 2**banded
    rows = Rows(64 * step, 65 * step, 128 * step)
    return rows.start - _decoder_rows(rows, banded)[1][0].grow(1).start


def _most_held(levels: Sequence[Level], areas: Sequence[int], fused: int) -> int:
    """The most numbers held at once where kernels run the outer ``fused`` levels and `fused.Inner` the others."""
    held = pooled = most = 0
    for k, (area, level) in enumerate(zip(areas, levels, strict=True)):
        skip = area * (level.enc + level.enc % 2)
        most = max(most, held + pooled + skip // 4 + skip * (1 if k < fused else 2))
        held, pooled = held + skip, skip // 4
    x = areas[-1] // 4 * 2 * levels[-1].enc  # the bottleneck's, or more
    most = max(most, held + pooled + 3 * x)
    for k in reversed(range(len(levels))):
        out, wide = areas[k] * levels[k].dec, areas[k] * levels[k].up
        if k >= fused:
            most = max(most, held + x + max(wide + out, 3 * out))
        elif k > 0 or levels[k].dec > _IMAGE_CHANNELS:
            most = max(most, held + x + out)
        held, x = held - areas[k] * (levels[k].enc + levels[k].enc % 2), out
    return most


def _peak(
    levels: Sequence[Level], encoded: Sequence[int], decoded: Sequence[int], dtype: torch.dtype, fused: int
) -> int:
    """Bytes held at once by levels of the given areas; with gradients, all that is kept for the backward pass.

    Of the outer ``fused`` levels these are an input, about as wide as ``up`` but half the size, and an output.
    """
    skips = sum(area * level.enc for area, level in zip(encoded, levels, strict=True))
    work = [
        area * (level.up // 4 + level.dec if k < fused else 2 * level.up + level.enc + level.dec)
        for k, (area, level) in enumerate(zip(decoded, levels, strict=True))
    ]
    if torch.is_grad_enabled():  # the pre-activations too
        return dtype.itemsize * (3 * skips + 2 * sum(work))
    return dtype.itemsize * (skips + max(work))
