"""The model of a run: frozen, quantized, with LoRA over it, checkpointed, sharded, loaded; in this order."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..formats.checkpoint import Checkpoint
from ..formats.names import plain_name
from ..formats.values import fill
from ..loading import build_empty
from ..models.pixel import PixelModel
from ..quantize.frozen import quantize_frozen
from .config import Config
from .freeze import freeze
from .pairs import add_pairs, start, targets
from .parallel import DTYPES, Workers, broadcast, load_sharded, shard


def check_base(config: Config) -> None:
    """Refuse a base that can't be one, before longer work; its tensors are not read.

    Raises:
        UserError: no base, or no L2P checkpoint.
    """
    if not config.model.base:
        raise UserError(
            "no model to start from; give model.base=FILE, a whole L2P checkpoint "
            "(python -m l2p_fast.convert init makes one from a Z-Image or another source)"
        )
    Checkpoint(config.model.base).demand("l2p")


def build(config: Config, workers: Workers) -> tuple[PixelModel, dict[str, nn.Parameter]]:
    """The model ready to train, and its trained parameters by name.

    Raises:
        UserError: a base that can't be used; a freeze policy that fits nothing.
    """
    dtype, bits = DTYPES[config.model.weights], config.model.frozen_bits
    base = Checkpoint(config.model.base)
    model = build_empty(base.l2p_config(), base.layout.source.name)
    model = nn.Module.to(model, dtype)  # diffusers' own warns, whatever the model
    freeze(model, config.freeze, bool(config.lora.rank))
    pairs = targets(model, config.lora)

    def read(name: str, parameter: Tensor) -> Tensor:
        if not config.parallel.fsdp:
            return base.tensor(name, dtype, workers.device)
        value = base.tensor(name, dtype) if workers.first else None
        return broadcast(tuple(parameter.shape), dtype, value, workers)

    if bits < 16:
        for name, block in model.blocks():
            quantize_frozen(block, bits, read, f"{name}.")
    if not config.parallel.fsdp:
        left = {name for name, held in (*model.named_parameters(), *model.named_buffers()) if held.is_meta}
        fill(model, {name: where for name, where in base.tensors.items() if name in left}, dtype, workers.device)
        model.eval()
    add_pairs(model, pairs, config, dtype)
    model.head.memory_mb = config.memory.head_mb
    if config.memory.checkpointing:
        model.enable_gradient_checkpointing(_checkpointing(config.memory.offload_checkpoints, workers.device))
    if config.parallel.fsdp:
        shard(model, config, workers)
        shapes = {name: tuple(held.shape) for name, held in (*model.named_parameters(), *model.named_buffers())}

        def value(name: str) -> Tensor:
            first = start(plain_name(name), shapes[name], config.seed)
            return base.tensor(plain_name(name), dtype) if first is None else first

        load_sharded(model, value, workers)
    return model, {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager:
    """Compute in ``model.compute`` with weights of another dtype; FSDP casts by its own policy."""
    if config.model.compute == config.model.weights or config.parallel.fsdp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _checkpointing(offload: bool, device: torch.device):
    """How a block runs so that only its input is kept, with ``offload`` in CPU memory."""

    def run(block: nn.Module, *args):
        keep = torch.autograd.graph.save_on_cpu(device.type == "cuda") if offload else contextlib.nullcontext()
        with keep:
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)

    return run
