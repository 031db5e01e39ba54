"""The Detailer Head: a U-Net that turns the noisy image and the transformer's features into the full-size prediction.

One class, four level tables (`variants.OF_PATCH`). B batch, C channels, H x W pixels, h x w token grid, D transformer
width.

At 4096 px the outer levels' feature maps take gigabytes although they hold little work, so `DetailerHead.forward` can
run the outer levels in bands of rows (bands.py), and without autograd, where kernels for it were compiled, each level
by one op (fused.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...ops import fused_levels, product_dtype
from ...variants import BOTTLENECK, OF_PATCH, scaled_channels
from . import bands
from .bands import Plan, Rows, Run
from .fused import Kernels, Library

BANDED_CHANNELS = 64  # levels up to this many encoder channels hold much memory and little work: these run in bands
AUTO_WIDE_MB = 320.0  # the same where kernels run in float32
AUTO_MEMORY_MB = 256.0  # working memory the head may take when neither bands nor budget are given; on CUDA instead:
CUDA_SHARE = 0.5  # of what is free there
CUDA_ELEMENTS = 2**31  # that no map reaches there: the library's kernels count in 32 bits


def free_cuda_bytes(device: torch.device) -> int:
    """What PyTorch can still allocate on a GPU: free, or kept for reuse."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class Settled(NamedTuple):
    """How a head runs images of one shape, found out once for all steps of a run, for it asks the device and waits.

    Attributes:
        given: what it holds for.
        plan: see `DetailerHead.plan`.
        kernels: see `DetailerHead.kernels`.
    """

    given: tuple
    plan: Plan | None
    kernels: Kernels | None


class SplitConv1x1(nn.Conv2d):
    """A 1x1 convolution over concat(x, resize(features)), without the concat and before the resize.

    A 1x1 convolution commutes with the nearest resize, so the D feature channels are mapped at their own h x w.
    """

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x (B, C, H, W), features (B, D, h, w) -> (B, out, H, W), in the dtype of x."""
        on_x, on_features = self.weight.to(x.dtype).split([x.shape[1], features.shape[1]], dim=1)
        tokens = features.to(x.dtype).permute(0, 2, 3, 1)  # the transformer's own layout: no copy
        mapped = F.linear(tokens, on_features.flatten(1)).permute(0, 3, 1, 2)
        if mapped.shape[-2:] != x.shape[-2:]:
            mapped = F.interpolate(mapped, size=x.shape[-2:], mode="nearest")
        return F.conv2d(x, on_x, self.bias.to(x.dtype)) + mapped


class DetailerHead(nn.Module):
    """The U-Net head of an L2P checkpoint.

    Args:
        patch_size: 16 (1K), 64 (4K), 128 (8K) or 160 (10K); chooses the level table.
        dim: the transformer's width D.
        width: multiplies every channel count but the 3-channel ends (to multiples of 4); 1.0 is the published head.

    Attributes:
        levels: its levels, from full resolution inwards.
        band_rows: rows of a band at full resolution; None chooses from ``memory_mb``.
        memory_mb: working memory in MB that the head aims to stay within, beside its input and output; None: 256 MB,
            where kernels run in float32 320, on CUDA half of what is free. What fits runs whole. It is an aim: the
            inner levels and the halo of a band set a floor.

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
        self._kernels: Kernels | None = None

        published = OF_PATCH[patch_size].levels
        self.levels = [level.scaled(width) for level in published]
        self.table_banded = sum(level.enc <= BANDED_CHANNELS for level in published)
        channels = 3
        for level in self.levels:
            self.add_module(f"enc{level.name}", nn.Sequential(nn.Conv2d(channels, level.enc, 3, padding=1), nn.SiLU()))
            channels = level.enc
        bottleneck = scaled_channels(BOTTLENECK, width)
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
        self,
        pixels: Tensor,
        features: Tensor,
        band_rows: int | None = None,
        memory_mb: float | None = None,
        settled: Settled | None = None,
    ) -> Tensor:
        """pixels (B, 3, H, W) in any dtype, features (B, D, h, w) -> (B, 3, H, W) in ``features``' dtype.

        ``band_rows`` and ``memory_mb`` override the attributes. H and W must be multiples of 2 to the number of levels.
        Channels-last features, such as a view of the transformer's tokens, are used without a copy. What was `settle`d
        is gone by as long as it holds.

        Raises:
            UserError: sizes that don't pool evenly, or features of another width.
        """
        self._check(pixels, features)
        if settled is None or not self._holds(settled, pixels, features.dtype, band_rows, memory_mb):
            settled = self.settle(pixels, features.dtype, band_rows, memory_mb)
        plan = settled.plan
        run = settled.kernels or Library(self, product_dtype(features.dtype, pixels.device))
        if plan is None:
            return self._inner(run, pixels, features, first=0).to(features.dtype).contiguous()
        banded, rows = plan
        height = pixels.shape[-2]
        pooled_height = height >> banded

        def encode(sample: Tensor, start: int, stop: int) -> Tensor:
            return bands.encode_band(run, sample, Rows(start, stop, pooled_height), banded)

        def decode(sample: Tensor, inner: Tensor, start: int, stop: int) -> Tensor:
            return bands.decode_band(run, sample, inner, Rows(start, stop, height), banded).to(features.dtype)

        # The inner levels go on channels-last; the image is contiguous.
        x = bands.sweep(encode, (pixels,), rows >> banded, pooled_height, torch.channels_last)
        x = self._inner(run, x, features, first=banded)
        return bands.sweep(decode, (pixels, x), rows, height, torch.contiguous_format)

    def settle(
        self, pixels: Tensor, dtype: torch.dtype, band_rows: int | None = None, memory_mb: float | None = None
    ) -> Settled:
        """How `forward` runs images of the shape and the device of ``pixels``, with features of ``dtype``.

        On a GPU this waits for it: free memory and the weights are looked at.
        """
        given = self._given(pixels, dtype, band_rows, memory_mb)
        plan = self.plan(pixels, dtype, band_rows or self.band_rows, memory_mb or self.memory_mb)
        return Settled(given, plan, self.kernels(pixels.device, dtype))

    def _given(self, pixels: Tensor, dtype: torch.dtype, band_rows: int | None, memory_mb: float | None) -> tuple:
        mode = torch.is_grad_enabled(), torch.compiler.is_compiling()
        return *pixels.shape, pixels.device, dtype, band_rows or self.band_rows, memory_mb or self.memory_mb, *mode

    def _holds(self, settled: Settled, *given) -> bool:
        """Whether it would be settled so again, as far as can be seen without waiting for the device."""
        same = settled.given == self._given(*given)
        return same and (settled.kernels is None or settled.kernels.looks_like(self))

    def _inner(self, run: Run, x: Tensor, features: Tensor, first: int) -> Tensor:
        """Levels ``first`` inwards and the bottleneck, whole: pooled image -> decoded features of its size."""
        skips = []
        for k in range(first, len(self.levels)):
            skip, x = run.encode(k, x, Rows.whole(x), Rows.whole(x))
            skips.append(skip)
        x = run.bottleneck(x, features)
        while skips:
            skip = skips.pop()
            x = run.decode(first + len(skips), x, Rows.whole(x), skip, Rows.whole(skip), Rows.whole(skip))
        return x

    def forward_reference(self, pixels: Tensor, features: Tensor) -> Tensor:
        """The same function written plainly: contiguous, concatenated, whole."""
        x, skips = pixels.to(features.dtype).contiguous(), []
        for level in self.levels:
            x = getattr(self, f"enc{level.name}")(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        resized = F.interpolate(features, size=x.shape[-2:], mode="nearest")
        conv, activation = self.bottleneck
        x = activation(F.conv2d(torch.cat([x, resized], dim=1), conv.weight, conv.bias))
        for level in reversed(self.levels):
            x = getattr(self, f"up{level.name}")(x)
            x = getattr(self, f"dec{level.name}")(torch.cat([x, skips.pop()], dim=1))
        return self.out_conv(x)

    def plan(
        self, pixels: Tensor, dtype: torch.dtype, band_rows: int | None = None, memory_mb: float | None = None
    ) -> Plan | None:
        """How ``pixels`` (B, 3, H, W) are run: in bands, or None for whole; ``memory_mb`` None is the default budget.

        As many levels are banded as the table says, with kernels one, or more, until the inner ones fit too
        (`bands.choose`).
        """
        batch, _, height, width = pixels.shape
        if band_rows is not None:
            step = 2**self.table_banded
            plan = Plan(self.table_banded, -(-band_rows // step) * step)
            return plan if plan.rows < height else None
        fused, maps = self._fused_count(pixels.device, dtype), product_dtype(dtype, pixels.device)
        on_cuda = pixels.device.type == "cuda"
        if memory_mb is not None:
            budget = memory_mb * 2**20
        elif on_cuda:
            budget = CUDA_SHARE * free_cuda_bytes(pixels.device)
        else:
            budget = (AUTO_WIDE_MB if fused and maps == torch.float32 else AUTO_MEMORY_MB) * 2**20
        fewest = 1 if fused else self.table_banded  # kernels are fast on every level; what is banded is made twice
        elements = CUDA_ELEMENTS if on_cuda else None
        plan = bands.choose(self.levels, fewest, (batch, height, width), maps, int(budget), fused, elements)
        by_sample = on_cuda and batch > 1  # a band as high as the image is one sample of a batch
        return plan if plan is not None and (plan.rows < height or by_sample) else None

    def peak_bytes(
        self, pixels: Tensor, dtype: torch.dtype, band_rows: int | None = None, memory_mb: float | None = None
    ) -> int:
        """What a forward pass over ``pixels`` (meta will do) takes at its peak, beside input and output, by `plan`.

        With gradients enabled it is what a backward pass takes.
        """
        batch, _, height, width = pixels.shape
        plan = self.plan(pixels, dtype, band_rows, memory_mb)
        fused, maps = self._fused_count(pixels.device, dtype), product_dtype(dtype, pixels.device)
        return bands.peak_bytes(self.levels, plan, (batch, height, width), maps, fused)

    def packed_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        """What `kernels` holds beside the weights themselves; for a head on the meta device."""
        count = self._fused_count(device, dtype)
        return Kernels(self, count, product_dtype(dtype, device)).nbytes if count else 0

    def convolutions(self, k: int) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        """Level ``k``'s convolutions: ``enc``, ``up`` and ``dec``."""
        name = self.levels[k].name
        enc, up, dec = (getattr(self, kind + name) for kind in ("enc", "up", "dec"))
        return enc[0], up[1], dec[0]

    def kernels(self, device: torch.device, dtype: torch.dtype) -> Kernels | None:
        """The kernels' way to run the levels, or None where there is none."""
        if torch.compiler.is_compiling() or not self._fused_count(device, dtype):
            return None
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        if any(type(conv) not in (nn.Conv2d, SplitConv1x1) for conv in convs):
            return None  # adapters
        if any(getattr(conv, hook, None) for conv in convs for hook in ("_diffusers_hook", "_hf_hook")):
            return None  # weights that come only when a convolution itself is called
        if any(conv.weight.dtype != dtype or conv.weight.device != device for conv in convs):
            return None  # stored otherwise until a hook brings them
        kernels = self._kernels  # another thread may renew it meanwhile
        if kernels is None or not kernels.is_of(self):
            kernels = self._kernels = None  # first give its memory back
            kernels = Kernels(self, self._fused_count(device, dtype), product_dtype(dtype, device))
            self._kernels = kernels
        return kernels

    def _fused_count(self, device: torch.device, dtype: torch.dtype) -> int:
        """How many levels, from the outermost on, kernels can run; on CUDA the inner ones are the library's."""
        if torch.is_grad_enabled() or not fused_levels(device, dtype):
            return 0
        return len(self.levels) if device.type == "cpu" else self.table_banded

    def _check(self, pixels: Tensor, features: Tensor) -> None:
        step = 2 ** len(self.levels)
        height, width = pixels.shape[-2:]
        if height % step or width % step:
            raise UserError(f"height and width must be multiples of {step} for this head, got {height} x {width}")
        if features.shape[:2] != (pixels.shape[0], self.dim):
            raise UserError(f"features must be ({pixels.shape[0]}, {self.dim}, h, w), got {tuple(features.shape)}")
