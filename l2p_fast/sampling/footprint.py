"""What drawing an image will take, by arithmetic: bytes on the device that draws.

Weights and the image are counted exactly, the Detailer Head by its own plan, a block by the tensors that its
feed-forward holds at once. Left out: the allocator's fragmentation, the libraries' own buffers, the CUDA context (about
0.5 GB). ``benchmarks/full_size.py`` compares it with measured peaks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..formats.checkpoint import Checkpoint
from ..formats.header import Stored
from ..formats.sources import LAYOUTS
from ..formats.text_encoder import open_encoder
from ..loading import IN_FULL, build_empty, put_in_bits
from ..models.blocks import SEQUENCE_MULTIPLE
from ..models.detailer import AUTO_MEMORY_MB
from ..models.pixel import PixelModel
from ..ops import product_dtype
from ..quantize import CodedLinear, products, stored
from .denoise import one_by_one
from .devices import free_bytes, pick_device, pick_dtype
from .facts import ModelFacts
from .offload import pick
from .request import Request, Setup

DECODING = 12  # bytes a value that unpacking holds at once: fp32, its product and codes
ENCODING = 300_000_000  # bytes that encoding two prompts takes, beside the encoder: every layer's hidden states


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


@dataclass
class Count:
    """What drawing an image takes.

    Attributes:
        what: the model and its dtype, as words.
        memory: of a step.
        encoder: bytes of the text encoders; None: they aren't here.
        peaks: the most bytes on the device at once, by the kind of offloading, with the head in small bands.
    """

    what: str
    memory: Memory
    encoder: int | None
    peaks: dict[str, int]


def counted(
    setup: Setup, facts: ModelFacts, device: torch.device, size: tuple[int, int] | None = None, guided: bool = True,
    cfg_batch: str = "auto", kept: int = 0,
) -> Count:  # fmt: skip
    """Count from the files' headers alone.

    Args:
        device: that draws; "meta" stands for a GPU that isn't here, with the plain head in small bands.
        size: (height, width) in pixels; None: the model's own.
        guided, cfg_batch: whether there is guidance, and whether its halves run as a batch.
        kept: bytes a pixel of an image to start from.

    Raises:
        UserError: a model or text encoder that isn't there or can't be used.
    """
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
    size = tuple(-(-side // unit) * unit for side in size or (facts.native_size, facts.native_size))
    alone = cfg_batch == "off" or (cfg_batch == "auto" and one_by_one(device, size))
    rows = 2 if guided and not alone else 1
    memory = expected(model, dtype, device, size, guided=guided, rows=rows)
    if model.head.memory_mb is None:  # the head takes what is there, and makes do with this
        model.head.memory_mb = AUTO_MEMORY_MB
    least = expected(model, dtype, device, size, guided=guided, rows=rows)
    for told in (memory, least):
        told.images += size[0] * size[1] * kept
    source = facts.path if setup.text_encoder is None else Path(setup.text_encoder)
    parts, there = [], os.path.isdir(source)
    if there:
        for part, _, kind in LAYOUTS[model.source].text:
            parts += encoder_parts(open_encoder(source, part, kind).tensors, dtype, quantize)
    kind, kept = str(dtype).removeprefix("torch."), ", ".join(stored.kinds(model))
    kind += f", blocks stored in {kept}" if kept else f", blocks in {quantize}" if quantize != "stored" else ""
    return Count(f"{facts.name}, {kind}", memory, sum(parts) if there else None, peaks(model, dtype, least, parts))


def encoder_parts(tensors: Mapping[str, Stored], dtype: torch.dtype, quantize: str) -> list[int]:
    """Bytes of each tensor of a text encoder, as `loading.load_text_encoders` keeps it."""

    def held(name: str, where: Stored) -> int:
        module, _, leaf = name.rpartition(".")
        linear = leaf == "weight" and len(where.shape) == 2 and not re.search("embed|shared", module)
        if linear and not any(word in module for word in IN_FULL):
            if quantize == "stored" and where.quantized:
                return where.nbytes + (where.scale.numel * 4 if where.scale else 0)
            if quantize != "stored" and products.fits(where.shape, quantize):
                return products.linear_bytes(where.shape, quantize)
        return where.numel * dtype.itemsize

    return [held(name, where) for name, where in tensors.items()]


def peaks(model: PixelModel, dtype: torch.dtype, memory: Memory, encoder: Sequence[int]) -> dict[str, int]:
    """The most bytes on the device at once, by the kind of offloading (`request.OFFLOAD`).

    Args:
        memory: of a step of ``model``, all of it on the device.
        encoder: bytes of each tensor of the text encoders.
    """

    def held(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters()) * dtype.itemsize + sum(b.nbytes for b in module.buffers())

    blocks = [held(block) for _, block in model.blocks()]
    # What streams in comes before what is there has left: two blocks, or two layers.
    rest, layers = memory.weights - sum(blocks), 2 * max(encoder, default=0) + ENCODING
    largest = max(held(module) for module in model.modules() if not list(module.children()))
    step = memory.total - memory.weights
    return {
        "none": sum(encoder) + memory.total,
        "text": max(memory.weights + layers, memory.total),
        "blocks": max(layers, rest + 2 * max(blocks) + step),
        "model": max(sum(encoder) + ENCODING, memory.total),
        "sequential": max(layers, 2 * largest + step),
    }


def plan(setup: Setup, request: Request, facts: ModelFacts, device_gb: float | None = None) -> str:
    """The dry run's text: memory by what holds it, from the files' headers alone.

    Args:
        device_gb: free memory of a GPU that isn't here, to plan for; None: what is here.

    Raises:
        UserError: a model, text encoder or device that isn't there or can't be used.
    """
    device = pick_device(setup) if device_gb is None else torch.device("meta")
    guided = request.guidance is None or request.guidance > 1
    size = request.height, request.width
    kept = 0 if request.starts_at is None else 3 + request.edits  # the image, and what of it is kept
    found = counted(setup, facts, device, size, guided, request.cfg_batch, kept)
    where = device if device_gb is None else f"a GPU with {device_gb:g} GB free"
    lines = [f"model      {found.what}; {request.width}x{request.height} on {where}"]
    memory, encoder = found.memory, found.encoder or 0
    rows = {"weights": memory.weights, "text encoder": encoder, "head's packed": memory.packed,
            "images": memory.images, "working": memory.working, "total": memory.total + encoder}  # fmt: skip
    lines += [f"{'memory' if i == 0 else '':11}{name:<18}{amount / 1e9:>9.2f} GB" for i, (name, amount) in
              enumerate(rows.items())]  # fmt: skip
    if found.encoder is None:
        lines[-1] += f", without the text encoder, as {setup.text_encoder or facts.path} is not here"
    if device.type != "cpu":
        told = ", ".join(f"{how} {amount / 1e9:.2f}" for how, amount in found.peaks.items())
        lines.append(f"offload    GB on the device at once: {told}")
        free = free_bytes(device) if device_gb is None else int(device_gb * 1e9)
        how, why = pick(free, lambda: found.peaks) if setup.offload == "auto" else (setup.offload, "")
        lines.append(f"{'':11}{how}: {found.peaks[how] / 1e9:.2f} GB{why}")
    return "\n".join(lines)
