"""What drawing an image will take, by arithmetic: bytes on the device that draws.

Weights and the image are counted exactly, the Detailer Head by its own plan, a block by the tensors that its
feed-forward holds at once. Left out: the allocator's fragmentation, the libraries' own buffers, the CUDA context (about
0.5 GB). ``benchmarks/full_size.py`` compares it with measured peaks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..formats.checkpoint import Checkpoint
from ..formats.sources import LAYOUTS
from ..formats.text_encoder import open_encoder
from ..loading import build_empty, put_in_bits
from ..models.blocks import SEQUENCE_MULTIPLE
from ..models.pixel import PixelModel
from ..ops import product_dtype
from ..quantize import CodedLinear, products, stored
from .denoise import one_by_one
from .facts import ModelFacts
from .request import Request, Setup
from .session import pick_device, pick_dtype

DECODING = 12  # bytes a value that unpacking holds at once: fp32, its product and codes


@dataclass
class Memory:
    """Bytes at the peak of a denoising step, by what holds them."""

    weights: int
    packed: int  # the Detailer Head's weights as its kernels want them, beside the stored ones
    images: int  # the state in fp32 and the predictions
    working: int  # the larger of a block's and the head's

    @property
    def total(self) -> int:
        return self.weights + self.packed + self.images + self.working


@torch.no_grad()
def expected(
    model: PixelModel,
    dtype: torch.dtype,
    device: torch.device,
    size: tuple[int, int],
    text_tokens: int | None = None,
    guided: bool = False,
    rows: int = 1,
) -> Memory:
    """The peak of a step of the (meta) ``model``, whose blocks are quantized as they will be.

    Args:
        dtype: of parameters and activations.
        device: that draws.
        size: (height, width) in pixels.
        text_tokens: of the longer prompt; None: as many as the model reads.
        guided: whether there are predictions for a negative prompt, too.
        rows: samples that run as a batch.
    """
    height, width = size
    device = torch.device(device)
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    weights += sum(buffer.nbytes for buffer in model.buffers())
    images = height * width * 3 * (4 + dtype.itemsize * (2 if guided else 1))
    grid = height // model.patch_size * (width // model.patch_size)
    parts = grid, model.max_tokens if text_tokens is None else text_tokens
    tokens = rows * sum(-(-count // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE for count in parts)
    features = tokens * model.width * dtype.itemsize
    pixels = torch.empty(1, 1, 1, 1, device=device).expand(rows, 3, height, width)
    head = features + model.head.peak_bytes(pixels, dtype)
    working = max(block_bytes(model, tokens, dtype, device), head)
    return Memory(weights, model.head.packed_bytes(device, dtype), images, int(working))


def block_bytes(model: PixelModel, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a block holds at once: `PixelModel.held`, and what a product makes beside it: copies, a decoded weight."""
    kept, wide = dtype.itemsize, product_dtype(dtype, device).itemsize
    layers = [
        m for _, block in model.blocks() for name, m in block.named_modules()
        if isinstance(m, torch.nn.Linear) and not any(word in name for word in model.of_time)
    ]  # fmt: skip
    widest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
    largest = widest.in_features * widest.out_features
    sides = [side / model.width for side in (widest.in_features, widest.out_features)]
    rounded = next((layer for layer in layers if isinstance(layer, CodedLinear)), None)
    copied, decoded = sum(sides) * wide, largest * wide  # of the input and the output, and of the weight
    if wide == kept:
        copied = 0.0
        if rounded is None:
            decoded = 0
    if isinstance(rounded, stored.StoredLinear):
        decoded = largest * (kept if wide == kept else kept + wide) + DECODING * min(stored.PIECE, largest)
    elif rounded is not None and rounded.weight.dtype != torch.uint8:  # the input twice in fp32 while it is rounded
        copied, decoded = (
            max(9.0, copied),
            decoded if device.type == "cpu" and rounded.weight.dtype == torch.int8 else 0,
        )
    each = max(model.held * kept, (model.held - max(sides)) * kept + copied)
    return int(tokens * model.width * each + decoded)


def plan(setup: Setup, request: Request, facts: ModelFacts) -> str:
    """The dry run's text: memory by what holds it, from the files' headers alone.

    Raises:
        UserError: a model, text encoder or device that isn't there or can't be used.
    """
    device = pick_device(setup)
    checkpoint = Checkpoint(facts.path / "transformer" if facts.is_pipeline else facts.path)
    model = build_empty(checkpoint.l2p_config(), checkpoint.layout.source.name)
    dtype = pick_dtype(setup.dtype, device)[0] or checkpoint.default_dtype
    quantize = "stored" if setup.quantize == "none" else setup.quantize
    if quantize != "stored":
        products.check(quantize, device)
    put_in_bits(model, checkpoint, quantize)
    if setup.head_memory_mb is not None:
        model.head.memory_mb = setup.head_memory_mb
    unit = model.size_multiple
    size = tuple(-(-side // unit) * unit for side in (request.height, request.width))
    guided = request.guidance is None or request.guidance > 1
    alone = request.cfg_batch == "off" or (request.cfg_batch == "auto" and one_by_one(device, size))
    memory = expected(model, dtype, device, size, guided=guided, rows=2 if guided and not alone else 1)
    if request.starts_at is not None:  # the image to start from, in bytes, and what of it is kept
        memory.images += size[0] * size[1] * (3 + request.edits)
    encoder, words = 0, ""
    source = facts.path if setup.text_encoder is None else setup.text_encoder
    if os.path.isdir(source):
        opened = [open_encoder(Path(source), part, kind) for part, _, kind in LAYOUTS[model.source].text]
        encoder = sum(where.numel for files in opened for where in files.tensors.values()) * dtype.itemsize
    else:
        words = f", without the text encoder, as {source} is not here"
    kind, kept = str(dtype).removeprefix("torch."), ", ".join(stored.kinds(model))
    kind += f", blocks stored in {kept}" if kept else f", blocks in {quantize}" if quantize != "stored" else ""
    lines = [f"model      {facts.name}, {kind}; {size[1]}x{size[0]} on {device}"]
    parts = {"weights": memory.weights, "text encoder": encoder, "head's packed": memory.packed,
             "images": memory.images, "working": memory.working, "total": memory.total + encoder}  # fmt: skip
    lines += [f"{'memory' if i == 0 else '':11}{name:<18}{count / 1e9:>9.2f} GB" for i, (name, count) in
              enumerate(parts.items())]  # fmt: skip
    return "\n".join(lines) + words
