"""Shapes <-> configuration, by arithmetic: what keys and shapes say about a model, and the ones that it must have.

Here are Z-Image's and the Detailer Head's; `sources.py` has the other sources'.

Loads no torch and builds no model, so that a stranger's file is judged before anything is made for it.

Letters: D = model width, P = patch size in pixels, A = min(D, 256) width of the timestep embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, few
from ..variants import BOTTLENECK, OF_PATCH, scaled_channels
from .header import Stored

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

STACKS = ("noise_refiner", "context_refiner", "layers")
HEAD = "local_decoder."
PIXEL_PARTS = ("all_x_embedder.", HEAD)  # what a latent model has in no usable form: drawn anew from it
BLOCKS_LIMIT = 1000  # in one stack; the published models have 30
# Constructor arguments that no key or shape tells, and what each may be. A folder's config.json or our files' metadata
# keep them.
NOT_IN_SHAPES = {
    "norm_eps": (float, 0.0, 0.1),
    "rope_theta": (float, 1.0, 1e9),
    "t_scale": (float, 1e-6, 1e6),
    "axes_dims": (int, 2, 4096),
    "axes_lens": (int, 1, 1 << 20),
    "rope_grid": (int, 1, 1 << 20),
    "x0_floor": (float, 1e-4, 1.0),
    "read_mean": (int, 1, 1 << 10),
}
LISTS = {"axes_dims": 3, "axes_lens": 3}  # those that are lists, of how many numbers
_WORDS = {3: "three numbers", 4: "four numbers"}


def checked_numbers(
    config: Mapping[str, Any], known: Mapping[str, tuple[type, float, float]], lists: Mapping[str, int]
) -> dict[str, Any]:
    """What ``config`` says of the arguments ``known`` (type, lowest, highest), some of them ``lists`` of a length.

    Raises:
        UserError: a value of another type, or out of range.
    """
    found = {}
    for name, (kind, low, high) in known.items():
        value = config.get(name)
        if value is None:
            continue
        numbers = value if name in lists and isinstance(value, (list, tuple)) else [value]
        right = len(numbers) == lists.get(name, 1)
        for number in numbers:
            right &= type(number) in ((int,) if kind is int else (int, float)) and low <= number <= high
        if not right:
            wanted = f"{_WORDS[lists[name]] if name in lists else 'a number'} from {low:g} to {high:g}"
            raise UserError(f"the configuration's {name} must be {wanted}, got {value!r:.60}")
        found[name] = tuple(numbers) if name in lists else kind(value)
    return found


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared by the RoPE axes (text, row, column): 1/4, 3/8, 3/8, each even.

    128 -> (32, 48, 48) as published; 32 -> (8, 12, 12).
    """
    side = 2 * round(head_dim * 3 / 16)
    return head_dim - 2 * side, side, side


def infer_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Constructor arguments of the transformer from our keys and shapes alone (also of a latent Z-Image).

    What shapes don't tell (`NOT_IN_SHAPES`) is left out, but for ``axes_dims``, which is guessed.

    Raises:
        UserError: a tensor that tells a size is missing, or blocks are.
    """
    wanted = {
        "cap_embedder.1.weight": 2, "cap_embedder.0.weight": 1, "layers.0.attention.norm_q.weight": 1,
        "layers.0.attention.to_q.weight": 2, "layers.0.attention.to_k.weight": 2,
    }  # fmt: skip
    lost = [key for key, rank in wanted.items() if len(shapes.get(key, ())) != rank or 0 in shapes[key]]
    embedders = {}
    for key, shape in shapes.items():
        found = re.fullmatch(r"all_x_embedder\.([1-9]\d{0,5})-([1-9]\d{0,5})\.weight", key)
        if found and len(shape) == 2:
            embedders[int(found[1]), int(found[2])] = shape[1]
    if not embedders:
        lost.append("all_x_embedder.{patch}-1.weight")
    if lost:
        raise UserError(
            f"{len(lost)} missing or misshapen ({few(lost)}), which tell the model's sizes; get the file again"
        )
    (patch, f_patch), inputs = next(iter(embedders.items()))
    dim, head_dim = shapes["cap_embedder.1.weight"][0], shapes["layers.0.attention.norm_q.weight"][0]
    counts = {stack: count_blocks(stack, shapes) for stack in STACKS}
    config = {
        "all_patch_size": tuple(p for p, _ in embedders),
        "all_f_patch_size": tuple(f for _, f in embedders),
        "in_channels": inputs // (patch * patch * f_patch),
        "dim": dim,
        "n_layers": counts["layers"],
        "n_refiner_layers": max(counts["noise_refiner"], counts["context_refiner"]),
        "n_heads": shapes["layers.0.attention.to_q.weight"][0] // head_dim,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head_dim,
        "cap_feat_dim": shapes["cap_embedder.0.weight"][0],
        "axes_dims": rope_axes(head_dim),
    }
    head = {key.removeprefix(HEAD): shape for key, shape in shapes.items() if key.startswith(HEAD)}
    if head and patch in OF_PATCH:
        config["head_width"] = head_width(head, patch, dim)
    return config


def block_numbers(stack: str, keys: Mapping[str, Any]) -> set[int]:
    """The numbers of the blocks of ``stack`` ("layers") that ``keys`` name."""
    return {int(m[1]) for m in (re.match(rf"{stack}\.(\d+)\.", key) for key in keys) if m}


def count_blocks(stack: str, shapes: Mapping[str, Shape]) -> int:
    """How many blocks ``stack`` has; each must be there."""
    numbers = block_numbers(stack, shapes)
    count = len(numbers)
    if count > BLOCKS_LIMIT:
        raise UserError(f"it has {count:,} {stack}, more than any model's ({BLOCKS_LIMIT:,}); get the file again")
    lost = [f"{stack}.{i}" for i in range(count) if i not in numbers]
    if lost:
        raise UserError(f"{few(lost)} missing, although {stack}.{max(numbers)} is there; get the file again")
    return count


# --- The other way ---------------------------------------------------------------------------------------------------
def model_shapes(config: Mapping[str, Any]) -> Shapes:
    """Our key -> shape of the L2P model of ``config``, as `infer_config` gives it.

    Raises:
        UserError: no L2P model has these sizes.
    """
    patches, dim = list(config["all_patch_size"]), config["dim"]
    if len(patches) != 1 or patches[0] not in OF_PATCH or list(config["all_f_patch_size"]) != [1]:
        raise UserError(f"no L2P model has patches of {few(patches)}; the known ones are {sorted(OF_PATCH)}")
    if config["in_channels"] != 3 or config["n_heads"] != config["n_kv_heads"] or dim % max(1, config["n_heads"]):
        sizes = f"{config['in_channels']} channels, width {dim}, {config['n_heads']} and {config['n_kv_heads']} heads"
        raise UserError(f"no L2P model has the sizes that these tensors tell: {sizes}")
    patch, features, time = patches[0], config["cap_feat_dim"], min(dim, 256)
    shapes: Shapes = {"x_pad_token": (1, dim), "cap_pad_token": (1, dim), "cap_embedder.0.weight": (features,)}
    linear = {
        f"all_x_embedder.{patch}-1": (dim, 3 * patch * patch),
        "cap_embedder.1": (dim, features),
        "t_embedder.mlp.0": (1024, 256),
        "t_embedder.mlp.2": (time, 1024),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    plain = _block_shapes(dim, dim // config["n_heads"])
    modulated = plain | {"adaLN_modulation.0.weight": (4 * dim, time), "adaLN_modulation.0.bias": (4 * dim,)}
    for stack in STACKS:
        block = plain if stack == "context_refiner" else modulated
        for i in range(config["n_layers" if stack == "layers" else "n_refiner_layers"]):
            shapes |= {f"{stack}.{i}.{key}": shape for key, shape in block.items()}
    head = head_shapes(patch, dim, config.get("head_width", 1.0))
    return shapes | {HEAD + key: shape for key, shape in head.items()}


def _block_shapes(dim: int, head_dim: int) -> Shapes:
    hidden = int(dim / 3 * 8)
    shapes: Shapes = {f"attention.{name}.weight": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    shapes |= {f"attention.{name}.weight": (head_dim,) for name in ("norm_q", "norm_k")}
    shapes |= {f"feed_forward.{name}.weight": (hidden, dim) for name in ("w1", "w3")}
    shapes["feed_forward.w2.weight"] = (dim, hidden)
    return shapes | {f"{name}{i}.weight": (dim,) for name in ("attention_norm", "ffn_norm") for i in (1, 2)}


def head_shapes(patch: int, dim: int, width: float = 1.0) -> Shapes:
    """Key -> shape of the Detailer Head of ``patch`` with its channels multiplied by ``width``."""
    levels = [level.scaled(width) for level in OF_PATCH[patch].levels]
    convs: Shapes = {}
    channels = 3
    for level in levels:
        convs[f"enc{level.name}.0"] = (level.enc, channels, 3, 3)
        channels = level.enc
    bottleneck = scaled_channels(BOTTLENECK, width)
    convs["bottleneck.0"] = (bottleneck, channels + dim, 1, 1)
    channels = bottleneck
    for level in reversed(levels):
        convs[f"up{level.name}.1"] = (level.up, channels, 3, 3)
        convs[f"dec{level.name}.0"] = (level.dec, level.up + level.enc, 3, 3)
        channels = level.dec
    convs["out_conv"] = (3, channels, 1, 1)
    shapes: Shapes = {}
    for name, shape in convs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def head_width(head: Mapping[str, Shape], patch: int, dim: int) -> float:
    """The head's width multiplier: the first round number that gives all its shapes, 1.0 if none does."""
    bottleneck = head.get("bottleneck.0.weight", (0,))[0]
    if bottleneck in (0, BOTTLENECK) or bottleneck > 16 * BOTTLENECK:
        return 1.0
    near = bottleneck / BOTTLENECK
    # A width rounds to the channel counts, so several give the same head; a short decimal is what a person chose.
    tries = [round(near, 1), round(near, 2), near, round(near, 3)] + [near + i / 1024 for i in range(-4, 5)]
    for width in dict.fromkeys(w for w in tries if w > 0):
        if head_shapes(patch, dim, width) == head:
            return width
    return near


# --- Comparing -------------------------------------------------------------------------------------------------------
def misshapen(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """Those in both that differ: ``name [came] instead of [wanted]``."""
    return [f"{k} {list(shapes[k])} instead of {list(s)}" for k, s in wanted.items() if k in shapes and shapes[k] != s]


def differences(found: Mapping[str, Stored], wanted: Mapping[str, Shape]) -> str:
    """``2 missing (a, b); 1 unexpected (c)``: the first few tensors and the counts; empty where all is as wanted."""
    shapes = {key: where.shape for key, where in found.items()}
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [where.name for key, where in found.items() if key not in wanted],
        "misshapen": misshapen(shapes, wanted),
    }
    return "; ".join(f"{len(names)} {what} ({few(names)})" for what, names in faults.items() if names)
