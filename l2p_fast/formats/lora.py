"""LoRA files of any trainer -> pairs of matrices by our module names, merged or added as an adapter."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import torch

from ..errors import UserError, few
from .checkpoint import Checkpoint
from .names import LAYOUTS, to_layout

logger = logging.getLogger(__name__)

_LORA_LEAVES = (
    (re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight$"), "A"),
    (re.compile(r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
)


def _lora_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    """Every name a LoRA file may give a module (ours, ComfyUI's, either with underscores) -> our modules."""
    names: dict[str, list[str]] = {}
    modules = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for layout in LAYOUTS:
        for theirs, ours in to_layout((f"{name}.weight" for name in modules), layout).items():
            names[theirs.removesuffix(".weight")] = [key.removesuffix(".weight") for key in ours]
    return names | {"lora_unet_" + name.replace(".", "_"): ours for name, ours in names.items()}


def read_lora(model: torch.nn.Module, path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Our module name -> (A (rank, in), B (out, rank)) in fp32 with alpha / rank folded into B.

    Fused ``qkv`` is cut into three. What only a latent model has (its patch embedding, its final layer) is left out
    with a warning.

    Raises:
        UserError: not a LoRA, not one of this model, an unsupported kind (LoHa, LoKr, DoRA), or NaN.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.is_lora:
        raise UserError(f"{path} is not a LoRA (no lora_A/lora_B or lora_down/lora_up in it); load it as a model")
    known, found, unknown = _lora_modules(model), {}, []
    for name in checkpoint.tensors:
        leaf = next(((name[: m.start()], kind) for rx, kind in _LORA_LEAVES if (m := rx.search(name))), None)
        if leaf is None:
            unknown.append(name)
        else:
            found.setdefault(leaf[0], {})[leaf[1]] = checkpoint.tensor(name, torch.float32)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} tensors are no plain LoRA's ({few(unknown)}); only A/B (down/up) pairs work"
        )
    result, latent = {}, []
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "weight")}
    for module, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise UserError(f"{path}: {module} lacks one half of its pair; the file is incomplete")
        if re.search(r"final_layer|x_embedder", module) and known.get(module) is None:
            latent.append(module)
            continue
        if module not in known:
            unknown.append(module)
            continue
        a, b = parts["A"], parts["B"]
        if "alpha" in parts:
            b = b * (float(parts["alpha"]) / a.shape[0])
        targets = known[module]
        if b.shape[0] % len(targets):
            raise UserError(f"{path}: {module} has {b.shape[0]} rows, not {len(targets)} equal parts")
        for target, part in zip(targets, b.chunk(len(targets)), strict=True):
            came, want = (part.shape[0], math.prod(a.shape[1:])), shapes[target]
            if came != (want[0], math.prod(want[1:])) or part.shape[1] != a.shape[0]:
                if "x_embedder" in module:
                    latent.append(module)
                    continue
                raise UserError(f"{path}: {module} is for a weight of {list(came)}, the model's is {list(want)}")
            if target in result:
                if len(targets) == 1:
                    raise UserError(f"{path} has {target} twice; remove one")
                continue  # a fused copy beside the split one
            result[target] = (a, part)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} modules are not in this model ({few(unknown)}); give a LoRA of it")
    if latent:
        logger.warning("%s: left out what only a latent model has: %s", path, few(latent))
    if not result:
        raise UserError(f"{path} changes nothing in this model ({few(latent)}); give a LoRA of it")
    return result


def load_lora(model: torch.nn.Module, path: str | Path, scale: float = 1.0, adapter: str | None = None) -> int:
    """Apply a Z-Image or L2P LoRA (diffusers, ComfyUI or kohya names, split or fused qkv). Returns the modules changed.

    Args:
        model: changed in place.
        path: the .safetensors file (or a folder with one).
        scale: multiplies the LoRA; -scale takes a merged one out again (up to rounding).
        adapter: None merges into the weights (W += scale * alpha/rank * B A, computed in fp32); a name adds a PEFT
            adapter of that name instead, which can be switched off or reweighted and works on quantized weights too.

    Raises:
        UserError: see `read_lora`; merging into quantized weights.
    """
    pairs = read_lora(model, path)
    if adapter is not None:
        state = {}
        for module, (a, b) in pairs.items():
            state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = a, b
        model.load_lora_adapter(state, prefix=None, adapter_name=adapter)
        model.set_adapters([adapter], [scale])
        return len(pairs)
    whole = [module for module in pairs if not model.get_submodule(module).weight.is_floating_point()]
    if whole:
        raise UserError(f"can't merge a LoRA into quantized weights ({few(whole)}); give adapter=NAME")
    with torch.no_grad():
        for module, (a, b) in pairs.items():
            weight = model.get_submodule(module).weight
            delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape).to(weight.device)
            weight.copy_(weight.float() + scale * delta)
    return len(pairs)
