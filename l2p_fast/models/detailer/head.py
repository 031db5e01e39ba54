"""The Detailer Head: a U-Net that turns the noisy picture and the transformer's features into the full-size prediction.

One class, four level tables. B batch, C channels, H x W pixels, h x w token grid, D transformer width.

At 4096 px the outer levels' feature maps take gigabytes although they hold little work. `DetailerHead.forward` can
therefore run the outer levels in bands of rows: one sweep encodes band by band and keeps only what those levels have
pooled, the inner levels run whole, and a second sweep decodes band by band and computes the outer skips anew instead of
storing them. Each band carries the rows that its convolutions reach into, so the result is that of the whole picture.
Under autograd each band is a checkpoint, so training memory is banded too. Left out: bands of columns.

A level is run by the library's convolutions (`_Library`), or without autograd, where kernels for it were compiled, by
one op that composes the decoder's convolutions (`_Fused`, ops/head.py). Both know the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import UserError
from ...ops.head import decoder_weights, encoder_weights, fused_levels, head_decode, head_encode
from ...variants import OF_PATCH, Level

BOTTLENECK = 512
BANDED_CHANNELS = 64  # levels up to this many encoder channels hold much memory and little work: these run in bands
AUTO_MEMORY_MB = 256.0  # working memory the head may take when neither bands nor budget are given


class SplitConv1x1(nn.Conv2d):
    """A 1x1 convolution over concat(x, resize(features)), without the concat and before the resize.

    A 1x1 convolution commutes with the nearest resize, so the D feature channels are mapped at their own h x w.
    """

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x (B, C, H, W), features (B, D, h, w) -> (B, out, H, W)."""
        on_x, on_features = self.weight.split([x.shape[1], features.shape[1]], dim=1)
        tokens = features.permute(0, 2, 3, 1)  # the transformer's own layout: no copy
        mapped = F.linear(tokens, on_features.flatten(1)).permute(0, 3, 1, 2)
        if mapped.shape[-2:] != x.shape[-2:]:
            mapped = F.interpolate(mapped, size=x.shape[-2:], mode="nearest")
        return F.conv2d(x, on_x, self.bias) + mapped


class Rows(NamedTuple):
    """Rows [start, stop) of a picture of ``height`` rows."""

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
        """The rows of the half-size picture that cover these."""
        return Rows(self.start // 2, -(-self.stop // 2), self.height // 2)

    def doubled(self) -> Rows:
        return Rows(2 * self.start, 2 * self.stop, 2 * self.height)

    def union(self, other: Rows) -> Rows:
        return self._replace(start=min(self.start, other.start), stop=max(self.stop, other.stop))

    def of(self, x: Tensor, held: Rows) -> Tensor:
        """These rows of ``x`` (B, C, rows, W), which holds the rows ``held``."""
        return x[:, :, self.start - held.start : self.stop - held.start]


class _Library:
    """Levels by the library's convolutions, differentiable.

    A convolution pads every edge of its window with zeros. At the picture's own edge that is right; elsewhere the
    window has one row more than wanted, and the row that the padding spoiled is cut off.
    """

    def __init__(self, head: DetailerHead, dtype: torch.dtype):
        self.head, self.dtype = head, dtype

    def encode(
        self, k: int, x: Tensor, held: Rows, rows: Rows, keep: bool = True, pool: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Level ``k`` of the encoder: ``rows`` of its output, and what is pooled from them; ``x`` holds ``held``."""
        needed = rows.grow(1)
        window = needed.of(x, held).to(self.dtype, memory_format=torch.channels_last)
        conv, _ = self.head._part("enc", self.head.levels[k])
        skip = _silu(rows.of(conv(window), needed))
        return skip, F.max_pool2d(skip, 2) if pool else None

    def decode(self, k: int, x: Tensor, held: Rows, skip: Tensor, skip_held: Rows, rows: Rows) -> Tensor:
        """``rows`` of level ``k`` of the decoder, from the next inner level's output; of level 0, of the picture."""
        needed, wide = rows.grow(1), rows.grow(2)
        upsample, conv = self.head._part("up", self.head.levels[k])
        covered = wide.pooled()
        x = wide.of(upsample(covered.of(x, held)), covered.doubled())
        x = needed.of(conv(x), wide)
        x = torch.cat([x, needed.of(skip, skip_held)], dim=1)
        conv, _ = self.head._part("dec", self.head.levels[k])
        x = _silu(rows.of(conv(x), needed))
        return self.head.out_conv(x) if k == 0 else x


class _Fused:
    """The outer ``count`` levels by one op each, with weights composed and packed once (ops/head.py). No gradients."""

    def __init__(self, head: DetailerHead, count: int):
        self.state, self.biases = self._state(head), self._biases(head)
        self.inner = _Library(head, head.out_conv.weight.dtype)
        self.encoders = [encoder_weights(head._part("enc", level)[0]) for level in head.levels[:count]]
        self.decoders = [
            decoder_weights(head._part("up", level)[1], head._part("dec", level)[0], head.out_conv if k == 0 else None)
            for k, level in enumerate(head.levels[:count])
        ]

    def is_of(self, head: DetailerHead) -> bool:
        """Whether the head's weights are still those."""
        return self.state == self._state(head) and torch.equal(self.biases, self._biases(head))

    @staticmethod
    def _state(head: DetailerHead) -> list[tuple[int, int]]:
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in head.parameters()]

    @staticmethod
    def _biases(head: DetailerHead) -> Tensor:
        """Writing through ``.data`` changes no version; what trains or averages weights so changes biases, too."""
        return torch.cat([p.detach() for p in head.parameters() if p.ndim == 1])

    def encode(
        self, k: int, x: Tensor, held: Rows, rows: Rows, keep: bool = True, pool: bool = True
    ) -> tuple[Tensor, Tensor]:
        """As `_Library.encode`."""
        if k >= len(self.encoders):
            return self.inner.encode(k, x, held, rows, keep, pool)
        skip, pooled = head_encode(
            x.permute(0, 2, 3, 1),
            self.encoders[k],
            x_start=held.start,
            start=rows.start,
            stop=rows.stop,
            height=rows.height,
            keep=keep,
            pool=pool,
        )
        return skip.permute(0, 3, 1, 2), pooled.permute(0, 3, 1, 2)

    def decode(self, k: int, x: Tensor, held: Rows, skip: Tensor, skip_held: Rows, rows: Rows) -> Tensor:
        """As `_Library.decode`."""
        if k >= len(self.decoders):
            return self.inner.decode(k, x, held, skip, skip_held, rows)
        out = head_decode(
            x.permute(0, 2, 3, 1),
            skip.permute(0, 2, 3, 1),
            self.decoders[k],
            x_start=held.start,
            skip_start=skip_held.start,
            start=rows.start,
            stop=rows.stop,
            height=rows.height,
        )
        return out if k == 0 else out.permute(0, 3, 1, 2)


class DetailerHead(nn.Module):
    """The U-Net head of an L2P checkpoint.

    Args:
        patch_size: 16 (1K), 64 (4K), 128 (8K) or 160 (10K); chooses the level table.
        dim: the transformer's width D.
        width: multiplies every channel count but the 3-channel ends (to multiples of 4); 1.0 is the published head.

    Attributes:
        band_rows: rows of a band at full resolution; None chooses from ``memory_mb``.
        memory_mb: working memory in MB that the head aims to stay within, beside its input and output; None: 256 MB.
            What fits runs whole. It is an aim: the inner levels and the halo of a band set a floor.

    Raises:
        UserError: a patch size without a table.
    """

    def __init__(self, patch_size: int, dim: int, width: float = 1.0):
        super().__init__()
        if patch_size not in OF_PATCH:
            raise UserError(f"no Detailer Head for patch size {patch_size}; choose one of {sorted(OF_PATCH)}")
        self.patch_size, self.dim, self.width = patch_size, dim, width
        self.band_rows: int | None = None
        self.memory_mb: float | None = None
        self._prepared: _Fused | None = None

        def scaled(channels: int) -> int:
            return channels if channels == 3 else max(4, 4 * round(channels * width / 4))

        published = OF_PATCH[patch_size].levels
        self.levels = [Level(name, scaled(enc), scaled(up), scaled(dec)) for name, enc, up, dec in published]
        self.table_banded = sum(level.enc <= BANDED_CHANNELS for level in published)
        channels = 3
        for level in self.levels:
            self.add_module(f"enc{level.name}", nn.Sequential(nn.Conv2d(channels, level.enc, 3, padding=1), nn.SiLU()))
            channels = level.enc
        bottleneck = scaled(BOTTLENECK)
        self.bottleneck = nn.Sequential(SplitConv1x1(channels + dim, bottleneck, 1), nn.SiLU())
        channels = bottleneck
        for level in reversed(self.levels):
            up = nn.Conv2d(channels, level.up, 3, padding=1)
            dec = nn.Conv2d(level.up + level.enc, level.dec, 3, padding=1)
            self.add_module(f"up{level.name}", nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), up))
            self.add_module(f"dec{level.name}", nn.Sequential(dec, nn.SiLU()))
            channels = level.dec
        self.out_conv = nn.Conv2d(channels, 3, 1)

    def forward(
        self, pixels: Tensor, features: Tensor, band_rows: int | None = None, memory_mb: float | None = None
    ) -> Tensor:
        """pixels (B, 3, H, W) in any dtype, features (B, D, h, w) -> (B, 3, H, W) in ``features``' dtype.

        ``band_rows`` and ``memory_mb`` override the attributes. H and W must be multiples of 2 to the number of levels.
        Channels-last features, such as a view of the transformer's tokens, are used without a copy.

        Raises:
            UserError: sizes that don't pool evenly, or features of another width.
        """
        self._check(pixels, features)
        plan = self.plan(pixels, features.dtype, band_rows or self.band_rows, memory_mb or self.memory_mb)
        run = self._fused(pixels.device, features.dtype) or _Library(self, features.dtype)
        if plan is None:
            return self._inner(run, pixels, features, first=0).contiguous()
        banded, rows = plan
        height, width = pixels.shape[-2:]
        pooled_height, pooled_width = height >> banded, width >> banded

        def encode(sample: Tensor, start: int, stop: int) -> Tensor:
            return self._encode_band(run, sample, Rows(start, stop, pooled_height), banded)

        def decode(sample: Tensor, inner: Tensor, start: int, stop: int) -> Tensor:
            return self._decode_band(run, sample, inner, Rows(start, stop, height), banded)

        x = self._sweep(encode, (pixels,), rows >> banded, (self.levels[banded - 1].enc, pooled_height, pooled_width))
        x = self._inner(run, x, features, first=banded)
        return self._sweep(decode, (pixels, x), rows, (3, height, width))

    def plan(
        self, pixels: Tensor, dtype: torch.dtype, band_rows: int | None = None, memory_mb: float | None = None
    ) -> tuple[int, int] | None:
        """How a picture is run: (number of banded levels, rows of a band at full resolution), or None for whole.

        By budget, what fits runs whole; else as many levels are banded as the table says, or more, until the inner ones
        fit too. If nothing fits, the least demanding way is taken.
        """
        batch, _, height, width = pixels.shape
        if band_rows is not None:
            step = 2**self.table_banded
            banded, rows = self.table_banded, -(-band_rows // step) * step
        else:
            budget = int((AUTO_MEMORY_MB if memory_mb is None else memory_mb) * 2**20)
            fused = self._fused_count(pixels.device, dtype)
            if self._whole_bytes(0, batch, height, width, dtype, fused) <= budget:
                return None
            least = None
            for depth in range(self.table_banded, len(self.levels)):
                depth_rows = self._rows_within(depth, width, dtype, budget, fused)
                inner = self._whole_bytes(depth, batch, height >> depth, width >> depth, dtype, fused)
                needed = max(inner, self._band_bytes(depth, depth_rows, width, dtype, fused))
                if least is None or needed < least:
                    least, banded, rows = needed, depth, depth_rows
                if needed <= budget:
                    break
        return (banded, rows) if rows < height else None

    def forward_reference(self, pixels: Tensor, features: Tensor) -> Tensor:
        """The same function written plainly: contiguous, concatenated, whole."""
        x, skips = pixels.to(features.dtype).contiguous(), []
        for level in self.levels:
            x = self._part("enc", level)(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        resized = F.interpolate(features, size=x.shape[-2:], mode="nearest")
        conv, activation = self.bottleneck
        x = activation(F.conv2d(torch.cat([x, resized], dim=1), conv.weight, conv.bias))
        for level in reversed(self.levels):
            x = self._part("up", level)(x)
            x = self._part("dec", level)(torch.cat([x, skips.pop()], dim=1))
        return self.out_conv(x)

    def _check(self, pixels: Tensor, features: Tensor) -> None:
        step = 2 ** len(self.levels)
        height, width = pixels.shape[-2:]
        if height % step or width % step:
            raise UserError(f"height and width must be multiples of {step} for this head, got {height} x {width}")
        if features.shape[:2] != (pixels.shape[0], self.dim):
            raise UserError(f"features must be ({pixels.shape[0]}, {self.dim}, h, w), got {tuple(features.shape)}")

    def _part(self, kind: str, level: Level) -> nn.Module:
        return getattr(self, kind + level.name)

    def _fused(self, device: torch.device, dtype: torch.dtype) -> _Fused | None:
        """The kernels' way to run the levels, or None where there is none."""
        if torch.compiler.is_compiling() or not self._fused_count(device, dtype):
            return None
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        if any(type(conv) not in (nn.Conv2d, SplitConv1x1) or conv.weight.dtype != dtype for conv in convs):
            return None  # adapters, other precisions
        if self._prepared is None or not self._prepared.is_of(self):
            self._prepared = None  # first give its memory back
            self._prepared = _Fused(self, self._fused_count(device, dtype))
        return self._prepared

    def _fused_count(self, device: torch.device, dtype: torch.dtype) -> int:
        """How many levels, from the outermost on, kernels can run; on CUDA the inner ones are the library's."""
        if torch.is_grad_enabled() or not fused_levels(device, dtype):
            return 0
        return len(self.levels) if device.type == "cpu" else self.table_banded

    def _inner(self, run: _Library | _Fused, x: Tensor, features: Tensor, first: int) -> Tensor:
        """Levels ``first`` inwards and the bottleneck, whole: pooled picture -> decoded features of its size."""
        skips = []
        for k in range(first, len(self.levels)):
            skip, x = run.encode(k, x, Rows.whole(x), Rows.whole(x))
            skips.append(skip)
        x = _silu(self.bottleneck[0](x, features))
        while skips:
            skip = skips.pop()
            x = run.decode(first + len(skips), x, Rows.whole(x), skip, Rows.whole(skip), Rows.whole(skip))
        return x

    def _encode_band(self, run: _Library | _Fused, pixels: Tensor, rows: Rows, banded: int) -> Tensor:
        """``rows`` of the picture after the outer ``banded`` levels and their pools."""
        wanted = [rows.doubled()]
        for _ in range(banded - 1):
            wanted.insert(0, wanted[0].grow(1).doubled())
        x, held = pixels, Rows.whole(pixels)
        for k, level_rows in enumerate(wanted):
            _, x = run.encode(k, x, held, level_rows, keep=False)
            held = level_rows.pooled()
        return x

    def _decode_band(self, run: _Library | _Fused, pixels: Tensor, inner: Tensor, rows: Rows, banded: int) -> Tensor:
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

    def _sweep(
        self, band: Callable[..., Tensor], inputs: tuple[Tensor, ...], rows: int, shape: tuple[int, int, int]
    ) -> Tensor:
        """Run ``band(*sample, start, stop)`` over all samples and bands of ``rows`` rows; -> (B, *shape)."""
        batch, height = inputs[0].shape[0], shape[1]
        spans = [(start, min(start + rows, height)) for start in range(0, height, rows)]
        if torch.is_grad_enabled():
            samples = []
            for i in range(batch):
                sample = [x[i : i + 1] for x in inputs]
                bands = [
                    checkpoint(band, *sample, *span, use_reentrant=False, preserve_rng_state=False) for span in spans
                ]
                samples.append(torch.cat(bands, dim=2))
            return torch.cat(samples)
        result = None
        for i in range(batch):
            sample = [x[i : i + 1] for x in inputs]
            for start, stop in spans:
                out = band(*sample, start, stop)
                if result is None:
                    result = out.new_empty((batch, *shape))
                    if shape[0] != 3:  # the inner levels go on channels-last; the picture is contiguous
                        result = result.to(memory_format=torch.channels_last)
                result[i : i + 1, :, start:stop] = out
        return result

    def _rows_within(self, banded: int, width: int, dtype: torch.dtype, budget: int, fused: int) -> int:
        """Rows of a band: a quarter of the budget, since bands that stay near the processor are the faster (half of it
        for fused levels, which cross memory less often); up to twice the halo where the budget allows, and never less
        than the halo, else most work is done several times."""
        step = 2**banded
        halo = -(-_halo(banded) // step) * step
        fixed = self._band_bytes(banded, 0, width, dtype, fused)  # what the halo takes
        per_step = self._band_bytes(banded, step, width, dtype, fused) - fixed
        small, large = ((limit - fixed) // per_step * step for limit in (budget // (2 if fused else 4), budget))
        return max(halo, small, min(large, 2 * halo))

    def _whole_bytes(self, first: int, batch: int, height: int, width: int, dtype: torch.dtype, fused: int = 0) -> int:
        """Peak bytes of the levels from ``first`` on, run whole, at height x width of the first."""
        areas = [batch * (height >> k) * (width >> k) for k in range(len(self.levels) - first)]
        return self._peak(self.levels[first:], areas, areas, dtype, fused - first)

    def _band_bytes(self, banded: int, rows: int, width: int, dtype: torch.dtype, fused: int = 0) -> int:
        """Peak bytes of decoding a band of ``rows`` rows, far from the picture's edges."""
        start = 2**20
        decoded, encoded = _decoder_rows(Rows(start, start + rows, 2 * start + rows), banded)
        areas = [
            [(r.stop - r.start) * (width >> k) for k, r in enumerate(held[:banded])] for held in (encoded, decoded)
        ]
        return self._peak(self.levels[:banded], *areas, dtype, fused)

    @staticmethod
    def _peak(levels: list[Level], encoded: list[int], decoded: list[int], dtype: torch.dtype, fused: int) -> int:
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


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _decoder_rows(rows: Rows, banded: int) -> tuple[list[Rows], list[Rows]]:
    """What ``rows`` of the result need: rows of the decoder's output at levels 0 to ``banded``, of the encoder's."""
    decoded = [rows]
    for _ in range(banded):
        decoded.append(decoded[-1].grow(2).pooled())  # two convolutions, then the half size
    encoded = [r.grow(1) for r in decoded[:banded]]  # as skips ...
    for k in range(banded - 1, 0, -1):  # ... and as the source of the next level's
        encoded[k - 1] = encoded[k - 1].union(encoded[k].grow(1).doubled())
    return decoded, encoded


def _halo(banded: int) -> int:
    """Rows of the picture that a decoded band reads beyond each of its edges."""
    step = 2**banded
    rows = Rows(64 * step, 65 * step, 128 * step)
    return rows.start - _decoder_rows(rows, banded)[1][0].grow(1).start
