"""What a run will take, by arithmetic: parameters by group, and bytes at the peak of a step.

Weights, gradients, states and averages are counted exactly. What autograd keeps of a block is counted on a small real
block and scaled by tokens x width, so it follows the code. Peak = what always stays + the larger of the two moments:
the head's backward pass, or that of a block. Left out: the allocator's fragmentation, the CUDA context (about 0.5 GB).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..formats.checkpoint import Checkpoint
from ..loading import build_empty
from ..models.pixel import PixelModel
from ..quantize.frozen import linear_bytes
from .config import Config, GridConfig
from .data import shapes_of
from .distil import teacher_passes
from .freeze import freeze, groups
from .optim import CHUNK, state_bytes
from .pairs import add_pairs, kept_bytes, targets
from .parallel import DTYPES

TEXT_TOKENS = 512  # the longest prompt
PIXEL_TENSORS = 6  # images held in fp32 at once: x0, noise, x_t, prediction, its error, its gradient
TEACHER_TENSORS = 2  # and where a teacher is followed: its state and one of its predictions


@dataclass
class Memory:
    """Bytes on one device at the peak of a step, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    kept: int  # inputs of the blocks, or all that autograd keeps without checkpointing
    working: int  # the larger of the head's and a block's backward pass, and the images
    accumulated: bool = False  # gradients of an earlier pass are there from the start

    @property
    def total(self) -> int:
        """Gradients grow as what is kept shrinks, so without accumulation the larger of the two counts."""
        passing = (sum if self.accumulated else max)((self.gradients, self.kept))
        return self.weights + self.optimizer + self.average + passing + self.working


def expected(config: Config, model: PixelModel, world: int = 1) -> Memory:
    """The peak of a step of the (meta) ``model``, whose parameters are frozen as the configuration says."""
    bits, width = config.model.frozen_bits, DTYPES[config.model.weights].itemsize
    quantized = set()
    if bits < 16:
        quantized = {
            f"{block_name}.{name}.weight" for block_name, block in model.blocks()
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        }  # fmt: skip
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    weights = sum(
        (linear_bytes(tuple(p.shape), bits) if name in quantized else p.numel() * width) // world
        for name, p in parameters.items()
    )
    largest = max(p.numel() for p in trained)
    if config.optim.fused:
        gradients = largest * width
    else:
        gradients = sum(p.numel() for p in trained) * width // world
    if world > 1:  # a gathered block, the one gathered ahead of it, and gradients on their way
        compute = DTYPES[config.model.compute].itemsize
        parts = [sum(p.numel() for p in block.parameters()) for _, block in model.blocks()]
        head = sum(p.numel() for p in model.head.parameters())
        root = sum(p.numel() for p in parameters.values()) - sum(parts) - head
        gradients += max(*parts, root) * (2 * compute + 4)
        if config.accumulation > 1:  # whole and in fp32, until the step's last pass exchanges them
            gradients += 4 * sum(p.numel() for p in trained)
    states = 0 if config.optim.offload else sum(state_bytes(p.shape, config.optim, width) for p in trained) // world
    average = 4 * sum(p.numel() for p in trained) // world if config.ema.decay and not config.ema.device else 0

    moments = [_activations(config, model, grid, grid.batch // (world * config.accumulation) or 1)
               for grid in config.data.grids]  # fmt: skip
    kept, working = max(moments, key=sum)
    update = 4 * 4 * min(CHUNK, largest)  # fp32 copies of the values being updated
    return Memory(weights, gradients, states, average, kept, max(working, update), config.accumulation > 1)


def _activations(config: Config, model: PixelModel, grid: GridConfig, batch: int) -> tuple[int, int]:
    """(what is kept, what a backward pass works in): bytes for a batch of images of ``grid``."""
    dtype, tokens = DTYPES[config.model.compute], grid.tokens
    measured = block_bytes(model, dtype)
    seen = [
        (batch * count * model.width, *measured[name.rpartition(".")[0]])
        for count, (name, _) in zip(model.block_tokens(tokens, TEXT_TOKENS), model.blocks(), strict=True)
    ]
    if config.memory.checkpointing:
        kept = 0 if config.memory.offload_checkpoints else sum(values for values, *_ in seen) * dtype.itemsize
        block = max(values * (per_value + temporary) for values, per_value, temporary in seen)
    else:
        kept = sum(values * per_value for values, per_value, _ in seen)
        block = max(values * temporary for values, _, temporary in seen)
    tokens_seen = [batch * count for count in model.block_tokens(tokens, TEXT_TOKENS)]
    pairs = kept_bytes(model, config.lora, tokens_seen, dtype)
    if config.memory.checkpointing:
        block += max(pairs)
    else:
        kept += sum(pairs)
    step = model.size_multiple // model.patch_size
    h, w = shapes_of(tokens, config.data.max_aspect, step)[0]
    held = PIXEL_TENSORS + (TEACHER_TENSORS if teacher_passes(config.objective) else 0)
    images = held * 4 * 3 * batch * h * w * model.patch_size**2
    height, width = (min(side, grid.head_crop or side) * model.patch_size for side in (h, w))
    return int(kept), int(images + max(block, head_bytes(model, batch, height, width, dtype, config.memory.head_mb)))


def head_bytes(model: PixelModel, batch: int, height: int, width: int, dtype: torch.dtype, budget_mb: float) -> int:
    """What the Detailer Head takes for a backward pass, in bands where it would not fit whole."""
    with torch.enable_grad():
        pixels = torch.empty(batch, 3, height, width, device="meta")
        return model.head.peak_bytes(pixels, dtype, memory_mb=budget_mb)


def block_bytes(model: PixelModel, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """By stack, bytes per token and channel of a block: (what autograd keeps, what its backward pass takes beside).

    Counted on `PixelModel.small`: what the forward pass of one block saves, and four gradients of its widest layer.
    """
    if dtype == torch.bfloat16:
        dtype = torch.float16  # as large; some CPUs multiply bfloat16 in float32, and the plan is for any device
    small, side = nn.Module.to(model.small(), dtype), 8  # diffusers' own warns, whatever the model
    own = {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers())}
    seen: dict[str, dict[int, int]] = {}
    widest: dict[str, int] = {}
    running: list[str] = []

    def note(tensor):
        storage = tensor.untyped_storage()
        if running and storage.data_ptr() not in own and tensor.is_floating_point():
            seen[running[-1]][storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = []
    for name, block in small.blocks():
        stack = name.rpartition(".")[0]

        def enter(_, __, stack=stack) -> None:
            running.append(stack)
            seen[stack] = {}  # of a stack's kinds of blocks the last counts

        hooks.append(block.register_forward_pre_hook(enter))
        hooks.append(block.register_forward_hook(lambda *_: running.pop() and None))
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                hooks.append(layer.register_forward_hook(
                    lambda _, __, out, stack=stack: widest.update({stack: max(widest.get(stack, 0), out.numel())})
                ))  # fmt: skip
    text_tokens = 32
    pixels = torch.randn(1, 3, side * small.patch_size, side * small.patch_size)
    texts = [torch.randn(text_tokens, small.text_width, dtype=dtype)]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        held = small.features(pixels, torch.full((1,), 0.5), texts)
    del held
    counts = small.block_tokens(side * side, text_tokens)
    values = {
        name.rpartition(".")[0]: count * small.width for count, (name, _) in zip(counts, small.blocks(), strict=True)
    }
    return {
        stack: (sum(kept.values()) / values[stack], 4 * widest[stack] / values[stack] * dtype.itemsize)
        for stack, kept in seen.items()
    }


def plan(config: Config, processes: int = 1, device_gb: float | None = None) -> str:
    """The dry run's text: parameters by group, memory, and whether it fits.

    Raises:
        UserError: a base that can't be read, a freeze policy that fits nothing.
    """
    path, patch = config.model.base, config.model.patch_size
    if path and Path(path).exists():
        base = Checkpoint(path)
        base.demand("l2p")
        model, what = build_empty(base.model_config(), base.layout.source.name), path
    else:
        model, what = build_empty({"all_patch_size": (patch,)}), f"the published one of patch {patch}"
        what += f" ({path} is not there)" if path else ""
    freeze(model, config.freeze, bool(config.lora.rank))
    adapted = targets(model, config.lora)
    add_pairs(model, adapted, config, DTYPES[config.model.weights])
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    how = f"{config.freeze.policy}, n = {config.freeze.n}"
    if adapted:
        how = f"LoRA of rank {config.lora.rank} over {len(adapted)} layers; in full: {how}"
    lines = [f"model      {what}: {_count(sum(sizes.values()))} parameters",
             f"trained    {_count(sum(sizes[n] for n in trained))}: {how}",
             f"{'':11}{'group':<18}{'trained':>12}{'frozen':>12}"]  # fmt: skip
    for group, names in groups(list(sizes)).items():
        counts = [sum(sizes[n] for n in names if (n in trained) == yes) for yes in (True, False)]
        lines.append(f"{'':11}{group:<18}{_count(counts[0]):>12}{_count(counts[1]):>12}")
    if count := teacher_passes(config.objective):
        lines.append(f"objective  {config.objective.kind}: {count} forward passes with the adapters off to each that "
                     "is trained; they keep nothing")  # fmt: skip
    world = processes if config.parallel.fsdp else 1
    memory = expected(config, model, world)
    lines.append(f"memory     of each of {world} devices" if world > 1 else "memory")
    if not memory.accumulated:
        lines[-1] += "; of gradients and kept the larger counts: one grows as the other shrinks"
    for name in ("weights", "gradients", "optimizer", "average", "kept", "working", "total"):
        lines.append(f"{'':11}{name:<18}{getattr(memory, name) / 1e9:>9.2f} GB")
    available, device = _device_memory(device_gb)
    verdict = "fits" if memory.total < 0.97 * available else "does not fit"
    lines.append(f"device     {device}, {available / 1e9:.1f} GB: {verdict}")
    return "\n".join(lines)


def _count(n: int) -> str:
    return f"{n / 1e9:.3f} G" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n / 1e3:.1f} k"


def _device_memory(given_gb: float | None) -> tuple[float, str]:
    if given_gb is not None:
        return given_gb * 1e9, "a device as given"
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    import os

    if not hasattr(os, "sysconf"):
        return math.inf, "the CPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the CPU"
