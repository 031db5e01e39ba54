"""Our names <-> those of other layouts: one table, both directions. Loads no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .header import Stored

# Ours (= published = diffusers' Z-Image names) | ComfyUI's. Several of ours in a row: they lie fused in one of theirs,
# row block after row block. {P}: the patch size, which theirs tells by its shape alone.
TABLE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv"),
    (("attention.to_out.0",), "attention.out"),
    (("attention.norm_q",), "attention.q_norm"),
    (("attention.norm_k",), "attention.k_norm"),
    (("all_x_embedder.{P}-1",), "x_embedder"),
    (("all_final_layer.{P}-1",), "final_layer"),
)
LAYOUTS = ("published", "comfyui")
# Wrappers that trainers and user interfaces put around the names above; stripped in this order.
ALL_IN_ONE = "model.diffusion_model."
PREFIXES = (ALL_IN_ONE, "diffusion_model.", "base_model.model.", "transformer.", "pipe.dit.", "module.")
# Other models in an all-in-one file, and a parameter that Z-Image's own file carries and never uses.
FOREIGN = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")
UNUSED = "norm_final."

_THEIRS = [(ours, re.compile(rf"((?:.*\.)?){re.escape(theirs)}(\..+)")) for ours, theirs in TABLE]
_OURS = [
    (re.compile(rf"((?:.*\.)?){re.escape(module).replace(re.escape('{P}'), '[0-9]+')}(\..+)"), place, theirs)
    for ours, theirs in TABLE
    for place, module in enumerate(ours)
]


def plain_name(name: str) -> str:
    """The name of a parameter or module as it is without adapters of PEFT's over it."""
    return name.replace(".base_layer", "")


def strip_prefix(name: str) -> str:
    """``name`` without the wrappers around it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def bare_names(raw: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """The transformer's tensors of a file, without prefixes; what belongs to other models is left out.

    Raises:
        UserError: two tensors have one name without their prefixes.
    """
    foreign = (*FOREIGN, UNUSED) if any(name.startswith(ALL_IN_ONE) for name in raw) else UNUSED
    bare: dict[str, Stored] = {}
    for name, where in raw.items():
        if name.startswith(foreign):
            continue
        short = strip_prefix(name)
        if short in bare:
            raise UserError(f"{path} has {short} twice ({bare[short].name} and {name}); remove one")
        bare[short] = where
    return bare


def _patch_of(in_features: int) -> int | None:
    """The patch size of a bare ``x_embedder``: 3 P^2 inputs for pixels, 16 P^2 for latents (never both)."""
    for channels in (3, 16):
        patch = math.isqrt(in_features // channels)
        if patch and channels * patch * patch == in_features:
            return patch
    return None


def to_ours(stored: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """ComfyUI's names and fused tensors as ours; published names pass unchanged.

    Raises:
        UserError: a fused tensor that can't be cut, or a tensor that is there in both layouts.
    """
    bare = stored.get("x_embedder.weight")
    patch = _patch_of(bare.shape[-1]) if bare is not None and len(bare.shape) == 2 else None
    if bare is not None and patch is None:
        raise UserError(f"{path}: x_embedder.weight {list(bare.shape)} fits no patch size (3 P^2 inputs wanted)")
    ours: dict[str, Stored] = {}
    for name, where in stored.items():
        names = [name]
        for our_modules, pattern in _THEIRS:
            if found := pattern.fullmatch(name):
                names = [found[1] + module.replace("{P}", str(patch)) + found[2] for module in our_modules]
                break
        if len(names) > 1 and (not where.shape or where.shape[0] % len(names)):
            raise UserError(f"{path}: {name} {list(where.shape)} can't be cut into {len(names)} equal parts")
        for i, our_name in enumerate(names):
            if our_name in ours:
                raise UserError(f"{path} has {our_name} twice ({ours[our_name].name} and {where.name}); remove one")
            count = where.shape[0] // len(names) if len(names) > 1 else 0
            ours[our_name] = where.rows(i * count, count) if len(names) > 1 else where
    return ours


def to_layout(keys: Iterable[str], layout: str, prefix: str = "") -> dict[str, list[str]]:
    """Name in the file -> our keys that it holds, in row order. The inverse of `to_ours`."""
    theirs: dict[str, dict[int, str]] = {}
    for key in keys:
        name, place = key, 0
        if layout == "comfyui":
            for pattern, i, module in _OURS:
                if found := pattern.fullmatch(key):
                    name, place = found[1] + module + found[2], i
        group = theirs.setdefault(prefix + name, {})
        if place in group:
            raise UserError(f"two tensors would be named {prefix + name}")
        group[place] = key
    return {name: [group[place] for place in sorted(group)] for name, group in theirs.items()}
