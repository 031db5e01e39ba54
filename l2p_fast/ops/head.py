"""One level of the Detailer Head in one pass: what an encoder or a decoder level computes, for a band of rows.

Why ops: a level's convolutions hold little work beside the feature maps that the library writes between them, and much
of the decoder's work can be left out. Its two convolutions have nothing between them, so nearest x2, ``up`` and the
half of ``dec`` that sees ``up`` are one convolution of the half-size input: 3 x 3 taps, with weights that depend on
whether row and column are even or odd. At the image's edge ``dec`` sees zeros where ``up`` would go on, so the first
and last row and column have weights of their own. `decoder_weights` makes them.

Here feature maps are (B, rows, W, C) and hold the rows of a band; a "start" is the first of them in the whole image,
which has ``height`` rows. Ci, Cs, Co: channels of input, skip and output. Weights are packed in blocks of 8 outputs,
(..., Co/8, tap row, tap column, Ci/2, 8, 2), filled up with zeros; those in float32 for Winograd's way: `pack`.
Kernels: bfloat16 and float32 on a CPU with AVX2 or AVX-512, bfloat16 on CUDA. Elsewhere the reference runs, and the
head prefers the library's convolutions (`fused_levels`).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activate import activate_reference

logger = logging.getLogger(__name__)

_BLOCK = 8

torch.library.define(
    "l2p_fast::head_encode",
    "(Tensor x, Tensor weight, Tensor bias, int channels, int x_start, int start, int stop, int height, bool keep, "
    "bool pool) -> (Tensor, Tensor)",
)
torch.library.define(
    "l2p_fast::head_decode",
    "(Tensor x, Tensor skip, Tensor weight, Tensor edge_weight, Tensor skip_weight, Tensor bias, Tensor edge_bias, "
    "Tensor? out_weight, Tensor? out_bias, int channels, int x_start, int skip_start, int start, int stop, int height) "
    "-> Tensor",
)


class EncoderWeights(NamedTuple):
    """What `head_encode` takes after ``x``."""

    weight: Tensor  # packed
    bias: Tensor  # (8 blocks,) fp32
    channels: int  # Co, even: an odd one is filled up with a channel of zeros


class DecoderWeights(NamedTuple):
    """What `head_decode` takes after ``x`` and ``skip``. Types of a row: first, even, odd, last."""

    weight: Tensor  # (4 types, 2 columns, packed), for x
    edge_weight: Tensor  # (4 types, 2 sides, packed with one tap column), what first and last column add
    skip_weight: Tensor  # packed
    bias: Tensor  # (4 types, 8 blocks) fp32
    edge_bias: Tensor  # (4 types, 2 sides, 8 blocks) fp32
    out_weight: Tensor | None  # (3, 8 blocks), the last 1x1 convolution
    out_bias: Tensor | None  # (3,) fp32
    channels: int  # Co


def pack(weight: Tensor) -> Tensor:
    """(..., Co, Ci, 3, kw) -> (..., Co/8, rows, kw, Ci/n, 8, n), with zeros where Co or Ci, even, is no multiple.

    In a dtype of 16 bits, n is 2 and ``rows`` are the three tap rows. Else n is 1, and three tap rows of three columns
    become four: Winograd's transform for two rows of the result, F(2, 3).
    """
    outputs, inputs = weight.shape[-4:-2]
    n = 2 if weight.dtype.itemsize == 2 else 1
    if n == 1 and weight.shape[-1] == 3:
        top, middle, bottom = weight.unbind(-2)
        weight = torch.stack([top, (top + middle + bottom) / 2, (top - middle + bottom) / 2, bottom], dim=-2)
    weight = F.pad(weight, (0, 0, 0, 0, 0, inputs % 2, 0, -outputs % _BLOCK))
    weight = weight.unflatten(-3, (-1, n)).unflatten(-5, (-1, _BLOCK))  # (..., blocks, 8, Ci/n, n, kh, kw)
    return weight.movedim((-2, -1, -4), (-5, -4, -3)).contiguous()


def unpack(weight: Tensor, outputs: int, inputs: int) -> Tensor:
    """The inverse of `pack`."""
    weight = weight.movedim((-5, -4, -3), (-2, -1, -4))
    weight = weight.flatten(-6, -5).flatten(-4, -3)[..., :outputs, :inputs, :, :]
    if weight.shape[-2] == 3:
        return weight
    top, plus, minus, bottom = weight.unbind(-2)
    return torch.stack([top, plus - minus, bottom], dim=-2)


def _tap_table() -> Tensor:
    """(4 types, 3 taps of dec, 3 taps of up, 3 rows of the half-size input): 1 where the two taps read that row.

    Of the image's first and last row, the tap of ``dec`` that leaves the image reads nothing.
    """
    table = torch.zeros(4, 3, 3, 3)
    for kind, (odd, missing) in enumerate(((0, -1), (0, None), (1, None), (1, 1))):
        for dec in (-1, 0, 1):
            for up in (-1, 0, 1):
                if dec != missing:
                    table[kind, dec + 1, up + 1, (odd + dec + up) // 2 + 1] = 1
    return table


def _padded(values: Tensor) -> Tensor:
    """(..., Co) with zeros up to whole blocks, at least fp32: the kernels add in fp32."""
    return F.pad(values, (0, -values.shape[-1] % _BLOCK)).to(torch.promote_types(values.dtype, torch.float32))


def encoder_weights(conv: nn.Conv2d, dtype: torch.dtype | None = None) -> EncoderWeights:
    """Pack an encoder level's convolution, in ``dtype`` or the weights' own."""
    channels = conv.out_channels + conv.out_channels % 2
    return EncoderWeights(pack(conv.weight.to(dtype or conv.weight.dtype)), _padded(conv.bias), channels)


def decoder_weights(
    up: nn.Conv2d, dec: nn.Conv2d, out: nn.Conv2d | None = None, dtype: torch.dtype | None = None
) -> DecoderWeights:
    """Compose and pack a decoder level's convolutions, with ``out`` the head's last.

    Composed in fp32 or wider, then rounded once to ``dtype`` or the weights' own.
    """
    dtype, wide = dtype or dec.weight.dtype, torch.promote_types(dec.weight.dtype, torch.float32)
    on_up, on_skip = dec.weight.split([up.out_channels, dec.in_channels - up.out_channels], dim=1)
    table = _tap_table().to(dec.weight.device, wide)
    first, second = up.weight.to(wide).permute(2, 3, 0, 1), on_up.to(wide).permute(2, 3, 0, 1)
    products = second[:, :, None, None] @ first  # (taps of dec, taps of up, Co, Ci)
    weight, edge = [], []
    for kind in table:
        rows = torch.einsum("abdeoi,adp->pbeoi", products, kind)
        inner = torch.einsum("pbeoi,xbeq->xoipq", rows, table[1:3])
        # First and last column lack one tap of dec; beside the zeros outside, that is felt by the middle column alone.
        missing = torch.einsum("pbeoi,xbe->xoip", rows, table[[0, 3], ..., 1] - table[1:3, ..., 1])
        weight.append(pack(inner.to(dtype)))
        edge.append(pack(missing.unsqueeze(-1).to(dtype)))
    inside = table.sum(-1)[..., 0]  # (types, taps of dec): whether the tap is in the image
    carried = second @ up.bias.to(wide)  # (taps of dec, Co): up's bias as dec sees it
    bias = dec.bias.to(wide) + torch.einsum("ta,abo->to", inside, carried)
    edge_bias = torch.einsum("ta,xb,abo->txo", inside, inside[[0, 3]] - 1, carried)
    return DecoderWeights(
        torch.stack(weight),
        torch.stack(edge),
        pack(on_skip.to(dtype)),
        _padded(bias),
        _padded(edge_bias),
        None if out is None else F.pad(out.weight.flatten(1), (0, -out.in_channels % _BLOCK)).to(dtype).contiguous(),
        None if out is None else out.bias.to(wide),
        dec.out_channels,
    )


def _window(x: Tensor, x_start: int, start: int, stop: int, height: int, dtype: torch.dtype) -> Tensor:
    """Rows [start, stop) of a band as (B, C, rows, W), zero outside the image, which is ``height`` rows high."""
    inside = x[:, max(start, 0) - x_start : min(stop, height) - x_start]
    return F.pad(inside.permute(0, 3, 1, 2).to(dtype), (0, 0, max(-start, 0), max(stop - height, 0)))


def head_encode_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    channels: int,
    x_start: int,
    start: int,
    stop: int,
    height: int,
    keep: bool,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    """`head_encode` in plain PyTorch: its specification."""
    window = _window(x, x_start, start - 1, stop + 1, height, weight.dtype).to(bias.dtype)
    unpacked = unpack(weight, channels, x.shape[3]).to(bias.dtype)
    out = F.silu(F.conv2d(window, unpacked, bias[:channels], padding=(0, 1))).to(weight.dtype)
    pooled = F.max_pool2d(out, 2) if pool else out[:, :, :0, ::2]
    out = out if keep else out[:, :, :0]
    return tuple(y.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format) for y in (out, pooled))


def head_decode_reference(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    edge_weight: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    edge_bias: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    channels: int,
    x_start: int,
    skip_start: int,
    start: int,
    stop: int,
    height: int,
) -> Tensor:
    """`head_decode` in plain PyTorch: its specification."""
    wide = bias.dtype
    first, last = start // 2, (stop + 1) // 2
    coarse = _window(x, x_start, first - 1, last + 1, height // 2, wide)
    composed = unpack(weight, channels, x.shape[3]).to(wide)
    missing = unpack(edge_weight, channels, x.shape[3]).to(wide)
    columns = []
    for column, side in ((0, 0), (1, -1)):  # even and odd columns, with the first and the last of them
        rows = []
        for kind in range(4):
            out = F.conv2d(coarse, composed[kind, column], bias[kind, :channels], padding=(0, 1))
            edge = F.conv2d(coarse[..., [side]], missing[kind, column], edge_bias[kind, column, :channels])
            rows.append(
                torch.cat(
                    [edge + out[..., :1], out[..., 1:]] if side == 0 else [out[..., :-1], edge + out[..., -1:]], -1
                )
            )
        by_row = torch.stack([rows[1], rows[2]], dim=3).flatten(2, 3)  # from row 2 * first on
        if first == 0:
            by_row = torch.cat([rows[0][:, :, :1], by_row[:, :, 1:]], dim=2)
        if 2 * last == height:
            by_row = torch.cat([by_row[:, :, :-1], rows[3][:, :, -1:]], dim=2)
        columns.append(by_row[:, :, start - 2 * first : stop - 2 * first])
    out = torch.stack(columns, dim=4).flatten(3, 4)
    window = _window(skip, skip_start, start - 1, stop + 1, height, wide)
    out = out + F.conv2d(window, unpack(skip_weight, channels, skip.shape[3]).to(wide), padding=(0, 1))
    out = F.silu(out).to(weight.dtype)
    if out_weight is None:
        return out.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    image = F.conv2d(out.to(wide), out_weight[:, :channels, None, None].to(wide), out_bias)
    return image.to(weight.dtype).contiguous()


def _encode_fake(x, weight, bias, channels, x_start, start, stop, height, keep, pool):
    batch, _, width, _ = x.shape
    rows = stop - start
    out = x.new_empty((batch, rows if keep else 0, width, channels), dtype=weight.dtype)
    return out, x.new_empty((batch, rows // 2 if pool else 0, width // 2, channels), dtype=weight.dtype)


def _decode_fake(x, skip, weight, *others):
    out_weight, channels, (start, stop) = others[4], others[6], others[9:11]
    batch, _, width, _ = skip.shape
    shape = (batch, stop - start, width, channels) if out_weight is None else (batch, 3, stop - start, width)
    return x.new_empty(shape, dtype=weight.dtype)


def _setup(ctx, inputs, output) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _backward_of(reference):
    """The backward pass is the reference's, on the inputs that were given."""

    def backward(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        inputs = [other[0] if other is not None else next(tensors).detach() for other in ctx.others]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                inputs[i].requires_grad_()
            results = reference(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        found = torch.autograd.grad(results, [inputs[i] for i in wanted], grads, allow_unused=True)
        filled = [None] * len(inputs)
        for i, grad in zip(wanted, found, strict=True):
            filled[i] = grad
        return tuple(filled)

    return backward


for _name, _reference, _fake in (
    ("head_encode", head_encode_reference, _encode_fake),
    ("head_decode", head_decode_reference, _decode_fake),
):
    torch.library.impl(f"l2p_fast::{_name}", "CompositeExplicitAutograd")(_reference)
    torch.library.register_fake(f"l2p_fast::{_name}")(_fake)
    torch.library.register_autograd(f"l2p_fast::{_name}", _backward_of(_reference), setup_context=_setup)


def head_encode(
    x: Tensor, weights: EncoderWeights, *, x_start: int, start: int, stop: int, height: int, keep: bool, pool: bool
) -> tuple[Tensor, Tensor]:
    """SiLU(conv 3x3) of a band, and its 2x2 maximum.

    Args:
        x: (B, rows, W, Ci), rows from ``x_start`` on: at least [start - 1, stop + 1), as far as the image goes. Any
            strides; float32 or bfloat16, brought to the weights' dtype.
        weights: of the level.
        start, stop: rows of the result; even with ``pool``.
        height: rows of the whole image; beyond it are zeros.
        keep, pool: which results are wanted; the other has no rows.

    Returns:
        (B, stop - start, W, Co) and (B, (stop - start) / 2, W / 2, Co) in the weights' dtype.
    """
    return torch.ops.l2p_fast.head_encode(x, *weights, x_start, start, stop, height, keep, pool)


def head_decode(
    x: Tensor,
    skip: Tensor,
    weights: DecoderWeights,
    *,
    x_start: int,
    skip_start: int,
    start: int,
    stop: int,
    height: int,
) -> Tensor:
    """SiLU(dec(concat(up(nearest x2 of x), skip))) of a band; for the last level the 1x1 convolution of that.

    Args:
        x: (B, rows, W / 2, Ci), rows of the half-size image from ``x_start`` on: one more than the result covers.
        skip: (B, rows, W, Cs), rows from ``skip_start`` on: one more than the result's, as far as the image goes.
        weights: of the level.
        start, stop: rows of the result.
        height: rows of the whole image, of skip's size.

    Returns:
        (B, stop - start, W, Co); with ``out_weight`` (B, 3, stop - start, W).
    """
    return torch.ops.l2p_fast.head_decode(x, skip, *weights, x_start, skip_start, start, stop, height)


def _small_levels(device: str) -> Iterator[tuple[str, tuple, Callable]]:
    """Every kind of level and what follows the library's convolutions, small: an op, its inputs, its reference."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, torch.bfloat16)

    def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
        made = nn.Conv2d(inputs, outputs, size)
        for parameter in made.parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=random) / 10)
        return made.to(device, torch.bfloat16)

    rows = 0, 0, 12, 12, True, True
    pixels = noise(1, 3, 12, 72).float().permute(0, 2, 3, 1)
    yield "head_encode", (pixels, *encoder_weights(conv(3, 16)), *rows), head_encode_reference
    for channels, outputs, out in ((16, 16, conv(16, 3, 1)), (64, 32, None)):
        x, skip = noise(1, 6, 36, channels), noise(1, 12, 72, channels)
        yield "head_encode", (skip, *encoder_weights(conv(channels, outputs)), *rows), head_encode_reference
        weights = decoder_weights(conv(channels, channels), conv(2 * channels, outputs), out)
        yield "head_decode", (x, skip, *weights, 0, 0, 0, 12, 12), head_decode_reference
    yield "activate", (noise(1, 4, 6, 16), noise(1, 4, 6, 16), noise(9, 16).float(), True, True), activate_reference


@functools.cache
def _disagreement(device: str) -> str | None:
    """Why the kernels of ``device`` are not trusted. None: on a small image they compute what the reference does."""
    errors = []
    try:
        for name, inputs, reference in _small_levels(device):
            found, wanted = getattr(torch.ops.l2p_fast, name)(*inputs), reference(*inputs)
            for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True):
                errors.append((a - b).float().norm() / b.float().norm())
        worst = torch.stack(errors).max().item()  # NaN where one is
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernels
    except RuntimeError as error:
        why = " ".join(str(error).split("\n")[0].split())
    else:
        if worst <= 1e-2:
            return None
        why = f"they differ from the reference by {worst:g}"
    logger.warning("the Detailer Head's kernels are not used on %s: %s", device, why)
    return why


def head_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernels run the two ops on this device and in this dtype, as words. None: they do.

    Those for CUDA are compared with the reference once before they are used; ``L2P_CUDA_HEAD=0`` switches them off.
    """
    if dtype not in {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}.get(device.type, ()):
        return f"there are none for {device.type} in {str(dtype).removeprefix('torch.')}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("l2p_fast::head_decode", device.type.upper()):
        return f"none for {device.type} were loaded"
    if device.type == "cpu":
        return None
    return "switched off by L2P_CUDA_HEAD=0" if os.environ.get("L2P_CUDA_HEAD") == "0" else _disagreement(str(device))


def fused_levels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run the two ops on this device and in this dtype."""
    return head_obstacle(device, dtype) is None
