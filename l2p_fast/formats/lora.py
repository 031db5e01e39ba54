"""LoRA files of any trainer -> pairs of matrices by our module names, merged or added as an adapter.

Known: diffusers and PEFT names (alpha in ``adapter_config.json`` or the file's metadata), ComfyUI's, kohya's, musubi's
and LyCORIS' plain LoRA (alpha as a tensor), split or fused. Left out: LoHa, LoKr, DoRA and whole-weight differences,
which are refused, and parts for a text encoder or an autoencoder, which are named and skipped.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, few
from .checkpoint import Checkpoint
from .header import AGAIN, load_json, parse_json
from .names import LAYOUTS, strip_prefix, to_layout
from .values import is_finite

logger = logging.getLogger(__name__)

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]

_LEAVES = (
    (re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight$"), "A"),
    (re.compile(r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
)
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_OTHER_PARTS = re.compile(r"(text_encoders?\d*|conditioner|vae|first_stage_model)\.|(lora_|lycoris_)?te\d?_|lora_text_")
_LATENT = re.compile(r"final_layer|x_embedder")


# --- Names -----------------------------------------------------------------------------------------------------------
def _module_names(model: nn.Module) -> dict[str, list[str]]:
    """Every name a LoRA file may give a module (ours, ComfyUI's, either with underscores) -> our modules."""
    names: dict[str, list[str]] = {}
    modules = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for layout in LAYOUTS:
        for theirs, ours in to_layout((f"{name}.weight" for name in modules), layout).items():
            names[theirs.removesuffix(".weight")] = [key.removesuffix(".weight") for key in ours]
    names |= {name.removesuffix(".0"): ours for name, ours in names.items() if name.endswith(".to_out.0")}
    return names | {prefix + name.replace(".", "_"): ours for name, ours in names.items() for prefix in _UNDERSCORED}


# --- Strength --------------------------------------------------------------------------------------------------------
class _Strength:
    """The factor alpha / rank of each module, where a file's metadata or a folder's adapter_config.json tells alpha.

    As PEFT has it: ``alpha_pattern`` and ``rank_pattern`` by module name or its end, before ``lora_alpha`` and ``r``;
    with ``use_rslora`` the factor is alpha / sqrt(rank). The rank is that of the tensors.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.where = where
        kind = str(config.get("peft_type") or "LORA")
        if kind != "LORA" or config.get("use_dora"):
            raise UserError(f"{where} is of a {kind:.20} with use_dora {config.get('use_dora')}; only plain LoRAs work")
        self.alpha = self._number(config.get("lora_alpha"), "lora_alpha")
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{where}: alpha_pattern is not an object; {AGAIN}")
        self.patterns: dict[str, float] = {}
        for pattern, alpha in patterns.items():
            # PEFT takes these for regular expressions; what it writes are names, and a stranger's expression may hang.
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", name):
                raise UserError(f"{where}: alpha_pattern {pattern!r:.60} is not a module's name; {AGAIN}")
            self.patterns[strip_prefix(name)] = self._number(alpha, "alpha_pattern")
        self.root = bool(config.get("use_rslora"))

    def _number(self, value: Any, name: str) -> float | None:
        if value is None:
            return None
        if type(value) not in (int, float) or not -1e6 <= value <= 1e6:
            raise UserError(f"{self.where}: {name} must be a number, got {value!r:.40}; {AGAIN}")
        return float(value)

    def __call__(self, module: str, rank: int) -> float:
        fitting = [p for p in self.patterns if module == p or module.endswith("." + p)]
        alpha = self.patterns[max(fitting, key=len)] if fitting else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)


def _strength(checkpoint: Checkpoint) -> _Strength:
    path, metadata = checkpoint.path, checkpoint.metadata.get("lora_adapter_metadata")
    if metadata is not None:
        try:
            found = parse_json(metadata)
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object")
        except ValueError as error:
            raise UserError(f"{path}: its lora_adapter_metadata is damaged ({error}); {AGAIN}") from error
        # A pipeline's file holds one for each component.
        own = {key.removeprefix("transformer."): v for key, v in found.items() if key.startswith("transformer.")}
        return _Strength(own or found, f"{path}: its lora_adapter_metadata")
    beside = path / "adapter_config.json"
    if path.is_file() and path.name == "adapter_model.safetensors":
        beside = path.with_name("adapter_config.json")
    return _Strength(load_json(beside) if beside.is_file() else {}, str(beside))


# --- Reading ---------------------------------------------------------------------------------------------------------
def read_lora(model: nn.Module, path: str | Path) -> Pairs:
    """Our module name -> (A (rank, in), B (out, rank)) in fp32, with the file's own strength folded into B.

    Fused ``qkv`` is cut into three. What only a latent model has (its patch embedding, its final layer) and what is for
    a text encoder is left out, with a warning.

    Raises:
        UserError: not a LoRA, not one of this model, an unsupported kind (LoHa, LoKr, DoRA), or NaN.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.is_lora:
        raise UserError(f"{path} is not a LoRA (no lora_A/lora_B or lora_down/lora_up in it); load it as a model")
    known, strength = _module_names(model), _strength(checkpoint)
    found, skipped = _modules_in(checkpoint)
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "weight")}
    result: Pairs = {}
    latent, unknown = [], []
    for module, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise UserError(f"{path}: {module} lacks one half of its pair; the file is incomplete")
        if module not in known:
            (latent if _LATENT.search(module) else unknown).append(module)
            continue
        a, b = parts["A"], parts["B"]
        if not a.dim() or not b.dim() or not a.shape[0]:
            raise UserError(f"{path}: {module} has matrices of {list(a.shape)} and {list(b.shape)}; {AGAIN}")
        factor = float(parts["alpha"]) / a.shape[0] if "alpha" in parts else strength(module, a.shape[0])
        targets = known[module]
        if b.shape[0] % len(targets):
            raise UserError(f"{path}: {module} has {b.shape[0]} rows, not {len(targets)} equal parts")
        for target, part in zip(targets, (b * factor).chunk(len(targets)), strict=True):
            came, want = (part.shape[0], math.prod(a.shape[1:])), shapes[target]
            if came != (want[0], math.prod(want[1:])) or part[0].numel() != a.shape[0]:
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
    if skipped:
        logger.warning("%s: left out %d tensors of other models: %s", path, len(skipped), few(skipped))
    if not result:
        raise UserError(f"{path} changes nothing in this model ({few(latent + skipped)}); give a LoRA of it")
    return result


def _modules_in(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """The file's module names -> its matrices and alpha, and what belongs to other models."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    skipped, unknown = [], []
    for name in checkpoint.tensors:
        leaf = next(((name[: m.start()], kind) for rx, kind in _LEAVES if (m := rx.search(name))), None)
        if _OTHER_PARTS.match(name):
            skipped.append(name)
        elif leaf is None:
            unknown.append(name)
        else:
            value = checkpoint.tensor(name, torch.float32)
            if leaf[1] == "alpha" and value.numel() != 1:
                raise UserError(f"{checkpoint.path}: {name} must be one number, got {list(value.shape)}; {AGAIN}")
            found.setdefault(leaf[0], {})[leaf[1]] = value
    if unknown:
        raise UserError(
            f"{checkpoint.path}: {len(unknown)} tensors are no plain LoRA's ({few(unknown)}); "
            "only A/B (down/up) pairs work"
        )
    return found, skipped


# --- Applying --------------------------------------------------------------------------------------------------------
def load_lora(model: nn.Module, path: str | Path, scale: float = 1.0, adapter: str | None = None) -> int:
    """Apply a Z-Image or L2P LoRA of any known layout (see `read_lora`). Returns the modules changed.

    Args:
        model: changed in place; on an error it is as it was.
        path: the .safetensors file (or a folder with one).
        scale: multiplies the LoRA; -scale takes a merged one out again (up to rounding).
        adapter: None merges into the weights (W += scale * alpha/rank * B A, computed in fp32; weights in 8 bits are
            rounded anew); a name adds a PEFT adapter of that name instead, which can be switched off or reweighted and
            leaves the weights, whatever their bits, as they are.

    Raises:
        UserError: see `read_lora`; merging into weights that can't take it; a sum that is not finite.
    """
    if not math.isfinite(scale):
        raise UserError(f"a LoRA's scale must be a finite number, got {scale}")
    pairs = read_lora(model, path)
    if adapter is not None:
        _add_adapter(model, pairs, adapter)
        model.set_adapters([adapter], [scale])
        return len(pairs)
    closed = [name for name in pairs if not _takes_sums(model.get_submodule(name))]
    if closed:
        raise UserError(
            f"can't merge a LoRA into the quantized weights of {few(closed)}; give adapter=NAME, or merge before"
        )
    with torch.no_grad():
        for apply in (False, True):  # all sums are looked at before the first is kept
            for name, (a, b) in pairs.items():
                module = model.get_submodule(name)
                own = hasattr(module, "load_weight")
                weight = module.weight_in(torch.float32) if own else module.weight.float()
                delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape).to(weight.device)
                changed = (weight + scale * delta).to(weight.dtype if own else module.weight.dtype)
                if not is_finite(changed):
                    raise UserError(
                        f"{path}: merged at {scale:g}, {name} would hold infinite values; try a lower scale"
                    )
                if apply and own:
                    module.load_weight([changed], module.weight.device)
                elif apply:
                    module.weight.copy_(changed)
    return len(pairs)


def _add_adapter(model: nn.Module, pairs: Pairs, adapter: str) -> None:
    state = {}
    for name, (a, b) in pairs.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a, b
    model.load_lora_adapter(state, prefix=None, adapter_name=adapter)
    for name, matrices in pairs.items():  # PEFT gives them the dtype of what they lie over, also where that is 8 bits
        layer = model.get_submodule(name)
        if layer.weight.dtype.itemsize == 1:
            for part, value in zip((layer.lora_A, layer.lora_B), matrices, strict=True):
                part[adapter].weight.data = value.to(part[adapter].weight.device, model.dtype)


def _takes_sums(module: nn.Module) -> bool:
    """Whether a LoRA can be merged: plain weights of 16 bits or more, or a module that rounds its weight itself."""
    weight = module.weight
    plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return plain or (hasattr(module, "weight_in") and hasattr(module, "load_weight"))
