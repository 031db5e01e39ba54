"""LoRA: low-rank pairs trained over frozen linear layers, whatever is trained in full beside them.

Names in a training are those of PEFT, ``layers.0.attention.to_q.lora_A.default.weight``; the file that a run leaves has
diffusers' names for a Z-Image's LoRA, which other programs read, too. Left out: the patch embedding and the head, which
no other program's model has: they are trained in full or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError, few
from ..formats.write import Piece, write_pieces
from ..models.pixel import PixelModel
from .config import BLOCKS, Config, LoraConfig

if TYPE_CHECKING:
    from ..formats.changes import Change
    from .state import TrainedTensors

ADAPTER = "default"
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def targets(model: PixelModel, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """The layers that get a pair, with the shapes (out, in) of their weights; none where the rank is 0.

    ``model`` is frozen already and has its own linear layers still.

    Raises:
        UserError: a pattern that fits no linear layer of the body, or one that is trained in full.
    """
    if not config.rank:
        return {}
    layers = {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith((*model.pixel_parts, *model.idle))
    }  # fmt: skip
    blocks = tuple(f"{name}." for name, _ in model.blocks())
    chosen = {}
    for pattern in config.targets:
        if pattern == BLOCKS:
            found = [n for n in layers if n.startswith(blocks) and not any(word in n for word in model.of_time)]
        else:
            found = [name for name in layers if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        if not found:
            some = few(dict.fromkeys(name.split(".", 2)[-1] for name in layers), 9)
            raise UserError(f"lora.targets: no linear layer of the transformer is called {pattern}; there are {some}")
        chosen |= dict.fromkeys(found)
    whole = [name for name in layers if name in chosen and layers[name].weight.requires_grad]
    if whole:
        raise UserError(
            f"lora.targets: {few(whole)} are trained in full; take freeze.policy=none, or pixels for the patch "
            "embedding and the head in full, or other targets"
        )
    return {name: tuple(layers[name].weight.shape) for name in layers if name in chosen}


def add_pairs(model: nn.Module, wanted: Mapping[str, tuple[int, int]], config: Config, dtype: torch.dtype) -> None:
    """Put a pair over each layer in ``wanted``, where the layer is (the meta device included), to be trained.

    A starts as PyTorch starts a linear layer, from a seed of its own; B starts at zero, so nothing changes at first.
    """
    if not wanted:
        return
    from ..formats.changes import Change, Pair
    from ..models.adapters import AdapterLayer, device_of

    for name, (outputs, inputs) in wanted.items():
        layer = AdapterLayer(model.get_submodule(name))
        device = device_of(layer.base_layer)
        shapes = {DOWN: (config.lora.rank, inputs), UP: (outputs, config.lora.rank)}
        if device.type == "meta":
            pair = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes.values()]
        else:
            pair = [start(name + part, shape, config.seed).to(device, dtype) for part, shape in shapes.items()]
        layer.add(ADAPTER, Change(Pair(*pair)))
        layer.set_adapter(ADAPTER)  # and to be trained
        layer.set_scale(ADAPTER, strength(config.lora))
        model.set_submodule(name, layer)


def start(name: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    """The values at which the parameter ``name`` of a pair starts, fp32; None: it is none of a pair."""
    if name.endswith(UP):
        return torch.zeros(shape)
    if not name.endswith(DOWN):
        return None
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def strength(config: LoraConfig) -> float:
    """What a pair's product is multiplied with: alpha / rank."""
    return (config.alpha or config.rank) / config.rank


def is_of_pair(name: str) -> bool:
    """Whether a trained tensor's name is that of half a pair."""
    return name.endswith((DOWN, UP))


def kept_bytes(model: nn.Module, config: LoraConfig, tokens: list[int], dtype: torch.dtype) -> list[int]:
    """What autograd keeps for the pairs of each of ``model.blocks()``, which see so many ``tokens``."""
    counts = [sum(is_of_pair(name) for name, _ in block.named_parameters()) // 2 for _, block in model.blocks()]
    return [count * seen * config.rank * dtype.itemsize for count, seen in zip(counts, tokens, strict=True)]


# --- What a run leaves ----------------------------------------------------------------------------------------------
def changes_of(held: TrainedTensors) -> dict[str, Change]:
    """The pairs of a training's checkpoint, by layer, in fp32, at the strength they were trained with."""
    from ..formats.changes import Change, Pair

    def read(name: str) -> Tensor:
        return torch.cat(list(held.piece(name).chunks(torch.float32)))

    names = [name.removesuffix(DOWN) for name in held.shapes if name.endswith(DOWN)]
    return {name: Change(Pair(read(name + DOWN), read(name + UP)).scaled(held.lora_scale)) for name in names}


def write_trained(held: TrainedTensors, folder: Path, ending: str = "") -> None:
    """Write what was trained in full to ``trained{ending}.safetensors``, pairs to ``lora{ending}.safetensors``.

    The pairs have diffusers' names for a Z-Image's LoRA and their strength folded in, so that alpha is the rank.
    """
    whole = {name: held.piece(name) for name in held.shapes if not is_of_pair(name)}
    if whole:
        write_pieces(whole, folder / f"trained{ending}.safetensors")
    pairs = {}
    for name, change in changes_of(held).items():
        dtype = held.piece(name + DOWN).dtype
        pairs[f"transformer.{name}.lora_A.weight"] = Piece.of_tensor(change.kind.down, dtype)
        pairs[f"transformer.{name}.lora_B.weight"] = Piece.of_tensor(change.kind.up, dtype)
    if pairs:
        write_pieces(pairs, folder / f"lora{ending}.safetensors")
