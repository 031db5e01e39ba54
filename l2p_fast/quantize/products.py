"""Weights of fewer bits for sampling: the blocks' linear layers in fp8 or int8, multiplied in 8 bits, or in 4 (nf4).

In 8 bits each row has a scale, and activations are rounded row by row on the fly, so nothing needs calibration; what
several layers read is rounded once, by the norm before them (`ops.norm_modulate_quantize`). In 4 bits each 64 values of
a row have a scale, and the weight is decoded for each product (NF4: Dettmers et al. 2023, arXiv 2305.14314). Off by
default, because it changes the image: `weight_error` tells how far the weights are off, `quantize` how far one
prediction is. Weights take a half or 0.28 of bf16's memory; 8-bit matrix units are faster. Left out: training (`frozen`
does that).

M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..ops import Linear, QuantizedRows, product_dtype, quantize_rows
from .coded import CodedLinear

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nf4": torch.uint8}  # nf4: two values a byte
MULTIPLE = 16  # of K and N, that the 8-bit matrix products ask for
LEAST_ROWS = 17  # of M, that CUDA's int8 product asks for; a text's stream may have fewer
BLOCK = 64  # values that share a scale in 4 bits
ROWS = 256  # rounded or decoded at a time, so that no weight is whole in fp32

# What the 16 values of 4 bits mean, of a block's largest: quantiles of the normal distribution.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round x (M, K) to ``dtype``, with scales in fp32.

    Returns:
        int8 or e4m3: values (M, K) and scales (M, 1). uint8, for NF4: pairs of values (M, K / 2), the first in the high
        bits, and scales (M, K / 64).
    """
    if dtype == torch.uint8:
        blocks = x.float().unflatten(-1, (-1, BLOCK))
        scale = blocks.abs().amax(-1)
        scaled = blocks / scale.clamp(min=1e-12).unsqueeze(-1)
        bounds = [(low + high) / 2 for low, high in zip(NF4, NF4[1:], strict=False)]
        index = torch.zeros(scaled.shape, dtype=torch.uint8, device=x.device)
        for bound in bounds:  # faster than a search, which returns wide integers
            index += scaled > bound
        pairs = index.flatten(-2).unflatten(-1, (-1, 2))
        return pairs[..., 0] << 4 | pairs[..., 1], scale
    values, scale, _ = quantize_rows(x, dtype)
    return values, scale


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """(256,) fp64, each holding the bits of the two fp32 values that a byte of NF4 means: one look-up for both."""
    values = torch.tensor(NF4)
    both = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    return both.view(torch.float64).flatten().to(device)


def decode(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (N, K) in ``dtype`` of what `encode` returned, decoded in fp32 and rounded once."""
    if weight.dtype != torch.uint8:
        return (weight.float() * scale).to(dtype)
    out = torch.empty(weight.shape[0], 2 * weight.shape[1], dtype=dtype, device=weight.device)
    for part, rows, scales in zip(out.split(ROWS), weight.split(ROWS), scale.split(ROWS), strict=True):
        values = _pairs(weight.device).index_select(0, rows.flatten().int()).view(torch.float32)
        torch.mul(values.view(len(rows), -1, BLOCK), scales.unsqueeze(-1), out=part.unflatten(-1, (-1, BLOCK)))
    return out


def _rows(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    return x if isinstance(x, QuantizedRows) else quantize_rows(x, dtype)


def lowbit_linear_reference(x: Tensor | QuantizedRows, weight: Tensor, scale: Tensor) -> Tensor:
    """`lowbit_linear` in fp32 from the same rounded values."""
    if weight.dtype == torch.uint8:
        index = torch.stack([weight >> 4, weight & 15], dim=-1).flatten(-2)
        values = torch.tensor(NF4, device=weight.device)[index.long()]
        return F.linear(x.float(), values * scale.repeat_interleave(BLOCK, dim=1)).to(x.dtype)
    values, x_scale, dtype = _rows(x, weight.dtype)
    return (F.linear(values.float(), weight.float()) * x_scale * scale.t()).to(dtype)


@functools.cache
def _adds_exactly() -> bool:
    """Whether int8 products are summed in 32 bits. Without VNNI a library may add pairs in 16, which saturate."""
    values = torch.full((32, 32), 127, dtype=torch.int8)
    return bool(torch._int_mm(values, values.t()).eq(32 * 127 * 127).all())


def lowbit_linear(x: Tensor | QuantizedRows, weight: Tensor, scale: Tensor, rounds_inputs: bool = True) -> Tensor:
    """x (..., K) times a weight that `encode` rounded: (..., N) in ``x``'s dtype, no gradients in 8 bits.

    Without ``rounds_inputs`` a weight of 8 bits is decoded for the product, as one of 4 always is. With it ``x`` may be
    rounded already, to the weight's dtype.
    """
    if weight.dtype == torch.uint8 or not rounds_inputs:
        wide = product_dtype(x.dtype, x.device)
        return F.linear(x.to(wide), decode(weight, scale, wide)).to(x.dtype)
    if weight.dtype == torch.int8 and weight.device.type == "cpu" and not _adds_exactly():
        return lowbit_linear_reference(x, weight, scale)
    rows = _rows(x, weight.dtype)
    values, x_scale = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
    if weight.dtype == torch.int8:
        few = max(0, LEAST_ROWS - len(values))
        out = torch._int_mm(F.pad(values, (0, 0, 0, few)) if few else values, weight.t())[: len(values)]
        out = out * x_scale * scale.t()
    else:  # its row-wise scales come with bf16 results only; sums of 3-bit products need no more than tensor cores keep
        scales = {"scale_a": x_scale, "scale_b": scale.t(), "out_dtype": torch.bfloat16}
        out = torch._scaled_mm(values, weight.t(), **scales, use_fast_accum=True)
    return out.unflatten(0, rows.values.shape[:-1]).to(rows.dtype)


class LowBitLinear(CodedLinear):
    """A linear layer that holds ``weight`` and ``weight_scale`` as `encode` makes them.

    Args:
        shape: (N, K).
        dtype: of `DTYPES`.
        device: where the buffers are made; their values come with `load_weight`.
        rounds_inputs: see `lowbit_linear`.
        bias: (N,), kept as it is; None: none.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rounds_inputs: bool = True,
        bias: nn.Parameter | None = None,
    ):
        nn.Module.__init__(self)
        self.rounds_inputs = rounds_inputs
        self.out_features, self.in_features = outputs, inputs = shape
        packed = dtype == torch.uint8
        self.register_parameter("bias", bias)
        self.register_buffer("weight", torch.empty(outputs, inputs // (2 if packed else 1), dtype=dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(outputs, inputs // BLOCK if packed else 1, device=device))
        self.squares = (0.0, 0.0)  # sums over the weight: of what rounding changed, and of the values

    @torch.no_grad()
    def load_weight(self, chunks: Iterable[Tensor], device: torch.device | str) -> None:
        """Round the weight, given as its rows in a piece after the other, and keep it on ``device``."""
        if self.weight.device != torch.device(device):
            self.weight = torch.empty_like(self.weight, device=device)
            self.weight_scale = torch.empty_like(self.weight_scale, device=device)
        first, squares = 0, torch.zeros(2, device=device)
        for chunk in chunks:
            for rows in chunk.split(ROWS):
                rows = rows.to(device, torch.float32)
                values, scale = encode(rows, self.weight.dtype)
                self.weight[first : first + len(rows)] = values
                self.weight_scale[first : first + len(rows)] = scale
                wrong = decode(values, scale, torch.float32) - rows
                squares += torch.stack([wrong.square().sum(), rows.square().sum()])
                first += len(rows)
        self.squares = tuple(squares.tolist())

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in ``dtype``."""
        return decode(self.weight, self.weight_scale, dtype)

    @property
    def row_dtype(self) -> torch.dtype | None:
        """Of the `ops.QuantizedRows` that it takes in place of values; None: none."""
        return self.weight.dtype if self.rounds_inputs and self.weight.dtype != torch.uint8 else None

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        out = lowbit_linear(x, self.weight, self.weight_scale, self.rounds_inputs)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}"


def check(name: str, device: torch.device) -> None:
    """That the type called ``name`` exists and ``device`` has it.

    Raises:
        UserError: an unknown name, or a GPU without fp8.
    """
    if name not in DTYPES:
        raise UserError(f"quantize: unknown {name!r}; choose from {', '.join(DTYPES)}")
    if device.type == "cuda" and name == "fp8" and torch.cuda.get_device_capability(device) < (9, 0):
        card = torch.cuda.get_device_name(device)
        raise UserError(f"fp8 needs a Hopper GPU or newer, and this is a {card}; try int8")


def is_quantized(layer: nn.Module, name: str) -> bool:
    """Whether `quantize_block` puts this layer into the type called ``name``."""
    return type(layer) in (nn.Linear, Linear) and fits(tuple(layer.weight.shape), name)


def fits(shape: tuple[int, int], name: str) -> bool:
    """Whether the type called ``name`` takes a weight of ``shape`` (N, K)."""
    outputs, inputs = shape
    return inputs % BLOCK == 0 if name == "nf4" else outputs % MULTIPLE == inputs % MULTIPLE == 0


def linear_bytes(shape: tuple[int, int], name: str) -> int:
    """Bytes of a weight (N, K) with its scales in the type called ``name``."""
    layer = LowBitLinear(shape, DTYPES[name], "meta")
    return sum(buffer.nbytes for buffer in layer.buffers())


def quantize_block(block: nn.Module, name: str, skip: tuple[str, ...] = (), rounds_inputs: bool = True) -> None:
    """Put a block's linear layers into fewer bits, in place; those whose names hold one of ``skip`` stay.

    Layers on the meta device are replaced by empty ones, to be filled by `LowBitLinear.load_weight`. ``rounds_inputs``:
    see `lowbit_linear`.
    """
    for path, layer in list(block.named_modules()):
        if not is_quantized(layer, name) or any(word in path for word in skip):
            continue
        weight = layer.weight.detach()
        rounded = LowBitLinear(tuple(weight.shape), DTYPES[name], weight.device, rounds_inputs, layer.bias)
        if not weight.is_meta:
            rounded.load_weight([weight], weight.device)
        block.set_submodule(path, rounded)


def quantize_blocks(model: nn.Module, name: str) -> None:
    """`quantize_block` for each of ``model.blocks()``.

    Raises:
        UserError: no layer has sizes that the products take.
    """
    for _, block in model.blocks():
        quantize_block(block, name, model.of_time)
    if not any(isinstance(module, LowBitLinear) for module in model.modules()):
        multiple = BLOCK if name == "nf4" else MULTIPLE
        raise UserError(f"quantize: {name} needs sizes that are multiples of {multiple}; no layer has; leave it out")


def weight_error(model: nn.Module) -> float | None:
    """How far the rounded weights of ``model`` are off, relative to their norm: sqrt(sum (q - w)^2 / sum w^2).

    None: it has none.
    """
    squares = [module.squares for module in model.modules() if isinstance(module, LowBitLinear)]
    if not squares:
        return None
    wrong, whole = (sum(part) for part in zip(*squares, strict=True))
    return math.sqrt(wrong / whole) if whole else 0.0


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """The prediction for fixed noise, halfway, on 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    side = 8 * model.size_multiple
    pixels = torch.randn(1, 3, side, side, generator=generator).to(model.device)
    text = torch.randn(16, model.text_width, generator=generator).to(model.device, model.dtype)
    return model(pixels, torch.tensor([0.5], device=model.device), [text]).float()


def quantize(model: nn.Module, name: str) -> float:
    """Put the linear layers of all blocks of ``model`` into fewer bits, in place, where the model is now.

    `loading.load_model(quantize=)` does the same while loading, without the whole model in 16 bits.

    Args:
        model: offers ``blocks()``.
        name: "fp8" (e4m3; on a GPU, Hopper or newer), "int8" or "nf4".

    Returns:
        The relative error of the prediction on a fixed input, against the model as it was.

    Raises:
        UserError: as `check`.
    """
    check(name, model.device)
    before = probe(model)
    quantize_blocks(model, name)
    return float((probe(model) - before).norm() / before.norm())
