"""8-bit weights for sampling: the blocks' linear layers in fp8 or int8, each row with a scale, multiplied in 8 bits.

Activations are rounded row by row on the fly, so nothing needs calibration. Off by default, because it changes the
picture: `quantize` measures by how much. Weights take half the memory of bf16 and 8-bit matrix units are faster.
Left out: training (frozen 8-bit blocks with gradients are bitsandbytes' work) and 4 bits.

M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.blocks import TransformerBlock
from ..models.zimage import L2PTransformer2DModel

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MULTIPLE = 16  # of K and N, that the 8-bit matrix products ask for


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


def lowbit_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times a rounded weight (N, K) with scales (N, 1): (..., N) in ``x``'s dtype, no gradients."""
    values, x_scale = encode(x.flatten(0, -2), weight.dtype)
    if weight.dtype == torch.int8:
        out = torch._int_mm(values, weight.t()) * x_scale * scale.t()
    else:  # its row-wise scales come with bf16 results only
        out = torch._scaled_mm(values, weight.t(), scale_a=x_scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    return out.unflatten(0, x.shape[:-1]).to(x.dtype)


class LowBitLinear(nn.Module):
    """A bias-free linear layer that holds ``weight`` (N, K) in 8 bits and ``weight_scale`` (N, 1) in fp32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight, scale = encode(linear.weight.detach(), dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return lowbit_linear(x, self.weight, self.weight_scale)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.weight.dtype}"


@torch.no_grad()
def _probe(model: L2PTransformer2DModel) -> Tensor:
    """The prediction for fixed noise, halfway, on 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    side = 8 * model.size_multiple
    pixels = torch.randn(1, 3, side, side, generator=generator).to(model.device)
    text = torch.randn(16, model.config.cap_feat_dim, generator=generator).to(model.device, model.dtype)
    return model(pixels, torch.tensor([0.5], device=model.device), [text]).float()


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


def quantize_block(block: TransformerBlock, name: str) -> None:
    """Put a block's linear layers into 8 bits, in place; those for the timestep stay."""
    for part in (block.attention, block.feed_forward):
        for path, layer in list(part.named_modules()):
            if isinstance(layer, nn.Linear) and not any(size % MULTIPLE for size in layer.weight.shape):
                part.set_submodule(path, LowBitLinear(layer, DTYPES[name]))


def quantize(model: L2PTransformer2DModel, name: str) -> float:
    """Put the linear layers of all blocks of ``model`` into 8 bits, in place, where the model is now.

    Args:
        name: "fp8" (e4m3; on a GPU, Hopper or newer) or "int8".

    Returns:
        The relative error of the prediction on a fixed input, against the model as it was.

    Raises:
        UserError: as `check`.
    """
    check(name, model.device)
    before = _probe(model)
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        quantize_block(block, name)
    return float((_probe(model) - before).norm() / before.norm())
