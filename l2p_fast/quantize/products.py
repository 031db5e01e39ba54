"""8-bit weights for sampling: the blocks' linear layers in fp8 or int8, each row with a scale, multiplied in 8 bits.

Activations are rounded row by row on the fly, so nothing needs calibration. Off by default, because it changes the
image: `weight_error` tells how far the weights are off, `quantize` how far one prediction is. Weights take half the
memory of bf16 and 8-bit matrix units are faster. Left out: training (`frozen` does that) and 4 bits.

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

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MULTIPLE = 16  # of K and N, that the 8-bit matrix products ask for
ROWS = 256  # rounded at a time, so that no weight is whole in fp32


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M, K) -> values (M, K) in ``dtype`` (int8 or e4m3) and scales (M, 1) fp32, so that x = values * scales."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / largest
    scaled = x.float() / scale
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def lowbit_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`lowbit_linear` in fp32 from the same rounded values."""
    values, x_scale = encode(x.flatten(0, -2), weight.dtype)
    out = F.linear(values.float(), weight.float()) * x_scale * scale.t()
    return out.unflatten(0, x.shape[:-1]).to(x.dtype)


@functools.cache
def _adds_exactly() -> bool:
    """Whether int8 products are summed in 32 bits. Without VNNI a library may add pairs in 16, which saturate."""
    values = torch.full((32, 32), 127, dtype=torch.int8)
    return bool(torch._int_mm(values, values.t()).eq(32 * 127 * 127).all())


def lowbit_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times a rounded weight (N, K) with scales (N, 1): (..., N) in ``x``'s dtype, no gradients."""
    if weight.dtype == torch.int8 and x.device.type == "cpu" and not _adds_exactly():
        return lowbit_linear_reference(x, weight, scale)
    values, x_scale = encode(x.flatten(0, -2), weight.dtype)
    if weight.dtype == torch.int8:
        out = torch._int_mm(values, weight.t()) * x_scale * scale.t()
    else:  # its row-wise scales come with bf16 results only; sums of 3-bit products need no more than tensor cores keep
        scales = {"scale_a": x_scale, "scale_b": scale.t(), "out_dtype": torch.bfloat16}
        out = torch._scaled_mm(values, weight.t(), **scales, use_fast_accum=True)
    return out.unflatten(0, x.shape[:-1]).to(x.dtype)


class LowBitLinear(nn.Linear):
    """A bias-free linear layer that holds ``weight`` (N, K) in 8 bits and ``weight_scale`` (N, 1) in fp32, as buffers.

    PEFT takes it for a linear layer, so adapters can be put over it.

    Args:
        shape: (N, K).
        dtype: int8 or e4m3.
        device: where the buffers are made; their values come with `load_weight`.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu"):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None)
        self.register_buffer("weight", torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(shape[0], 1, device=device))
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
                squares += torch.stack([(values.float() * scale - rows).square().sum(), rows.square().sum()])
                first += len(rows)
        self.squares = tuple(squares.tolist())

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in ``dtype``."""
        return (self.weight.float() * self.weight_scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return lowbit_linear(x, self.weight, self.weight_scale)

    def _apply(self, fn, recurse: bool = True):
        """Moved with the model, but never cast with it."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}"


def check(name: str, device: torch.device) -> None:
    """That the 8 bits called ``name`` exist and ``device`` has them.

    Raises:
        UserError: an unknown name, or a GPU without fp8.
    """
    if name not in DTYPES:
        raise UserError(f"quantize: unknown {name!r}; choose from {', '.join(DTYPES)}")
    if device.type == "cuda" and name == "fp8" and torch.cuda.get_device_capability(device) < (9, 0):
        card = torch.cuda.get_device_name(device)
        raise UserError(f"fp8 needs a Hopper GPU or newer, and this is a {card}; try int8")


def quantize_block(block: nn.Module, name: str) -> None:
    """Put a block's linear layers into 8 bits, in place; those with a bias (they are for the timestep) stay.

    Layers on the meta device are replaced by empty ones, to be filled by `LowBitLinear.load_weight`.
    """
    for path, layer in list(block.named_modules()):
        if type(layer) is not nn.Linear or layer.bias is not None:
            continue
        weight = layer.weight.detach()
        if any(size % MULTIPLE for size in weight.shape):
            continue
        rounded = LowBitLinear(tuple(weight.shape), DTYPES[name], weight.device)
        if not weight.is_meta:
            rounded.load_weight([weight], weight.device)
        block.set_submodule(path, rounded)


def quantize_blocks(model: nn.Module, name: str) -> None:
    """`quantize_block` for each of ``model.blocks()``.

    Raises:
        UserError: no layer has sizes that 8-bit products take.
    """
    for _, block in model.blocks():
        quantize_block(block, name)
    if not any(isinstance(module, LowBitLinear) for module in model.modules()):
        raise UserError(
            f"quantize: {name} products need sizes that are multiples of {MULTIPLE}; no layer has; leave it out"
        )


def weight_error(model: nn.Module) -> float | None:
    """How far the 8-bit weights of ``model`` are off, relative to their norm: sqrt(sum (q - w)^2 / sum w^2).

    None: it has none.
    """
    squares = [module.squares for module in model.modules() if isinstance(module, LowBitLinear)]
    if not squares:
        return None
    wrong, whole = (sum(part) for part in zip(*squares, strict=True))
    return math.sqrt(wrong / whole) if whole else 0.0


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    """The prediction for fixed noise, halfway, on 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    side = 8 * model.size_multiple
    pixels = torch.randn(1, 3, side, side, generator=generator).to(model.device)
    text = torch.randn(16, model.text_width, generator=generator).to(model.device, model.dtype)
    return model(pixels, torch.tensor([0.5], device=model.device), [text]).float()


def quantize(model: nn.Module, name: str) -> float:
    """Put the linear layers of all blocks of ``model`` into 8 bits, in place, where the model is now.

    `loading.load_model(quantize=)` does the same while loading, without the whole model in 16 bits.

    Args:
        model: offers ``blocks()``.
        name: "fp8" (e4m3; on a GPU, Hopper or newer) or "int8".

    Returns:
        The relative error of the prediction on a fixed input, against the model as it was.

    Raises:
        UserError: as `check`.
    """
    check(name, model.device)
    before = _probe(model)
    quantize_blocks(model, name)
    return float((_probe(model) - before).norm() / before.norm())
