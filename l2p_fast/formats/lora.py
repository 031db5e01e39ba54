"""Adapter files of any trainer -> what they change, by our module names.

Known: LoRA, LoHa, LoKr, DoRA, biases and whole differences, under the names of diffusers and PEFT (alpha in
``adapter_config.json`` or the file's metadata), ComfyUI, kohya, musubi and LyCORIS (alpha as a tensor), split or fused.
What fits nothing in the model is named and left out. Left out always: Tucker-decomposed convolutions, OFT.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, few
from .changes import Change, Difference, Hadamard, Kronecker, Pair
from .checkpoint import Checkpoint
from .header import AGAIN, load_json, parse_json
from .names import LAYOUTS, TABLE, strip_prefix, to_layout

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

_LEAVES = tuple(
    (re.compile(rf"\.{pattern}$"), part)
    for pattern, part in (
        (r"(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight", "down"),
        (r"(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight", "up"),
        (r"(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.bias", "up_bias"),
        (r"alpha", "alpha"),
        (r"(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)", "magnitude"),
        (r"(?:diff|w_norm)", "diff"),
        (r"(?:diff_b|b_norm)", "diff_b"),
        *((rf"({name})(?:\.default)?", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        *((rf"({name})(?:\.default)?", name) for w in ("lokr_w1", "lokr_w2") for name in (w, f"{w}_a", f"{w}_b")),
    )
)
_REFUSED = re.compile(r"\.(hada_t[12]|lokr_t[12]|lora_mid|b?oft_\w+)\b")  # without them the rest means something else
FUSED = next((ours, theirs) for ours, theirs in TABLE if len(ours) > 1)  # what lies in one of ComfyUI's tensors
CONFIG = "adapter_config.json"
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_OTHER_PARTS = re.compile(r"(text_encoders?\d*|conditioner|vae|first_stage_model)\.|(lora_|lycoris_)?te\d?_|lora_text_")
_KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # PEFT's, and what each calls alpha


# --- Names -----------------------------------------------------------------------------------------------------------
def module_names(modules: Iterable[str]) -> dict[str, list[str]]:
    """Every name an adapter file may give one of our ``modules`` (ours, ComfyUI's, either with underscores) -> ours."""
    names: dict[str, list[str]] = {}
    modules = list(modules)
    for layout in LAYOUTS:
        for theirs, ours in to_layout((f"{name}.weight" for name in modules), layout).items():
            names[theirs.removesuffix(".weight")] = [key.removesuffix(".weight") for key in ours]
    names |= {name.removesuffix(".0"): ours for name, ours in names.items() if name.endswith(".to_out.0")}
    return names | {prefix + name.replace(".", "_"): ours for name, ours in names.items() for prefix in _UNDERSCORED}


# --- Strength --------------------------------------------------------------------------------------------------------
class _Strength:
    """The factor alpha / rank of each module, where a file's metadata or a folder's adapter_config.json tells alpha.

    As PEFT has it: ``alpha_pattern`` and ``rank_pattern`` by module name or its end, before ``lora_alpha`` and ``r``;
    with ``use_rslora`` the factor is alpha / sqrt(rank). The rank is that of the tensors, where they have one.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.where = where
        kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
        if kind not in _KINDS:
            raise UserError(f"{where} is of a {kind:.20}; LoRA, LoHa, LoKr and DoRA work")
        self.alpha = self._number(config.get(_KINDS[kind]), _KINDS[kind])
        self.rank = self._number(config.get("r"), "r")
        self.alphas, self.ranks = (self._patterns(config, name) for name in ("alpha_pattern", "rank_pattern"))
        self.root = bool(config.get("use_rslora"))

    def _patterns(self, config: Mapping[str, Any], field: str) -> dict[str, float | None]:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{self.where}: {field} is not an object; {AGAIN}")
        found = {}
        for pattern, value in patterns.items():
            # PEFT takes these for regular expressions; what it writes are names, and a stranger's expression may hang.
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", name):
                raise UserError(f"{self.where}: {field} {pattern!r:.60} is not a module's name; {AGAIN}")
            found[strip_prefix(name)] = self._number(value, field)
        return found

    def _number(self, value: Any, name: str) -> float | None:
        if value is None:
            return None
        if type(value) not in (int, float) or not -1e6 <= value <= 1e6:
            raise UserError(f"{self.where}: {name} must be a number, got {value!r:.40}; {AGAIN}")
        return float(value)

    def __call__(self, module: str, rank: int | None) -> float:
        alpha, told = self._of(module, self.alphas, self.alpha), self._of(module, self.ranks, self.rank)
        rank = rank or told
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)

    @staticmethod
    def _of(module: str, patterns: Mapping[str, float | None], otherwise: float | None) -> float | None:
        fitting = [p for p in patterns if module == p or module.endswith("." + p)]
        return patterns[max(fitting, key=len)] if fitting else otherwise


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
    beside = _config_of(path)
    return _Strength(load_json(beside) if beside.is_file() else {}, str(beside))


def _config_of(path: Path) -> Path:
    """Where PEFT writes an adapter's configuration."""
    return path.with_name(CONFIG) if path.name == "adapter_model.safetensors" else path / CONFIG


def files_of(path: str | Path) -> list[Path]:
    """The files that an adapter's ``path`` is read from, sorted.

    Raises:
        UserError: see `Checkpoint`.
    """
    found = {where.file for where in Checkpoint(path).tensors.values()}
    beside = _config_of(Path(path))
    return sorted(found | ({beside} if beside.is_file() else set()))


# --- Reading ---------------------------------------------------------------------------------------------------------
def read_lora(shapes: Shapes, path: str | Path) -> dict[str, Change]:
    """Our module name -> what the file changes in it, in fp32, with the file's own strength folded in.

    Fused ``qkv`` is cut into three. What fits nothing in the model (another model's layers, a latent model's patch
    embedding, a text encoder) is left out, with a warning that names it.

    Args:
        shapes: the model's parameters by name.
        path: the .safetensors file (or a folder with one).

    Raises:
        UserError: not an adapter, nothing in it fits, a kind that can't be read, half of a pair, or NaN.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.is_lora:
        raise UserError(f"{path} is not a LoRA (no lora_A/lora_B or lora_down/lora_up in it); load it as a model")
    weights = {name.removesuffix(".weight"): tuple(shape) for name, shape in shapes.items() if not _is_bias(name)}
    known, strength = module_names(weights), _strength(checkpoint)
    found, others = _modules_in(checkpoint)
    result: dict[str, Change] = {}
    misfits, seen = [], set()
    # Split layers first: where a fused copy lies beside them, they count.
    for module, parts in sorted(found.items(), key=lambda item: len(known.get(item[0], ()))):
        targets = known.get(module)
        if targets is None:
            misfits.append(f"{module} (not in this model)")
            continue
        if len(targets) == 1 and targets[0] in seen:
            raise UserError(f"{path} has {targets[0]} twice; remove one")
        change = _change(path, module, parts, strength, len(targets))
        for target, part in zip(targets, change, strict=True):
            if target in seen:
                continue  # a fused copy beside the split one
            seen.add(target)
            misfit = _misfit(part, weights[target], shapes.get(f"{target}.bias"))
            if misfit:
                misfits.append(f"{module} ({misfit})")
            else:
                result[target] = part
    if not result:
        raise UserError(f"{path} changes nothing in this model ({few(misfits + others)}); give a LoRA of it")
    if misfits:
        logger.warning("%s: left out %d layers that don't fit: %s", path, len(misfits), few(misfits))
    if others:
        logger.warning("%s: left out %d tensors that are no part of it: %s", path, len(others), few(others))
    return result


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _modules_in(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The file's module names -> its parts, and the tensors that are none: of other models, or not known."""
    found: dict[str, dict[str, Tensor]] = {}
    others, unknown = [], []
    for name in checkpoint.tensors:
        leaf = next(((name[: m.start()], part) for rx, part in _LEAVES if (m := rx.search(name))), None)
        if _OTHER_PARTS.match(name):
            others.append(name)
        elif leaf is None:
            unknown.append(name)
        else:
            value = checkpoint.tensor(name, torch.float32)
            if leaf[1] == "alpha" and value.numel() != 1:
                raise UserError(f"{checkpoint.path}: {name} must be one number, got {list(value.shape)}; {AGAIN}")
            found.setdefault(leaf[0], {})[leaf[1]] = value
    if refused := [name for name in unknown if _REFUSED.search(name)]:
        raise UserError(
            f"{checkpoint.path}: {len(refused)} tensors are of a kind that is not read ({few(refused)}); LoRA, LoHa, "
            "LoKr, DoRA and diff work"
        )
    return found, others + unknown


def _change(
    path: str | Path, module: str, parts: Mapping[str, Tensor], strength: _Strength, count: int
) -> list[Change]:
    """What the ``parts`` of one of the file's modules do to each of our ``count`` layers that it holds."""

    def need(*names: str) -> list[Tensor]:
        if lost := [name for name in names if name not in parts]:
            raise UserError(f"{path}: {module} lacks {lost[0]}, one half of its pair; the file is incomplete")
        return [parts[name] for name in names]

    def factor_of(name: str) -> nn.Module:
        """A factor of LoKr, whole or low-rank."""
        if name in parts:
            return Difference(parts[name])
        up, down = need(f"{name}_a", f"{name}_b")
        return Pair(down, up)

    kinds, rank = [], None
    if {"down", "up"} & parts.keys():
        kinds.append(Pair(*need("down", "up")))
        rank = kinds[-1].down.shape[0] if kinds[-1].down.dim() else 0
    if any(name.startswith("hada") for name in parts):
        up1, down1, up2, down2 = need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        kinds.append(Hadamard(Pair(down1, up1), Pair(down2, up2)))
        rank = down1.shape[0] if down1.dim() else 0
    if any(name.startswith("lokr") for name in parts):
        kinds.append(Kronecker(factor_of("lokr_w1"), factor_of("lokr_w2")))
        low = [part for part in (kinds[-1].right, kinds[-1].left) if isinstance(part, Pair)]
        rank = low[0].down.shape[0] if low and low[0].down.dim() else None
    if "diff" in parts:
        kinds.append(Difference(parts["diff"]))
    if len(kinds) > 1:
        raise UserError(f"{path}: {module} has {len(kinds)} kinds of change at once; {AGAIN}")
    kind = kinds[0] if kinds else None
    if kind is None and "diff_b" not in parts:
        raise UserError(f"{path}: {module} has {few(parts)} and no matrices; the file is incomplete")
    if kind is not None and not kind.is_whole:
        shapes = few([f"{name} {list(value.shape)}" for name, value in parts.items()], 6)
        raise UserError(f"{path}: {module} has matrices that don't fit each other ({shapes}); {AGAIN}")

    factor = 1.0
    if kind is not None and not isinstance(kind, Difference):
        whole = isinstance(kind, Kronecker) and rank is None  # LyCORIS writes an alpha there, too, and means 1
        factor = strength(module, rank)
        if "alpha" in parts:
            factor = 1.0 if whole else float(parts["alpha"]) / rank
    bias = parts.get("diff_b")
    if "up_bias" in parts:
        bias = parts["up_bias"] * factor + (0 if bias is None else bias)
    magnitude = parts.get("magnitude")
    if kind is not None and kind.fits[0] % count or bias is not None and (bias.dim() != 1 or len(bias) % count):
        raise UserError(f"{path}: {module} can't be cut into {count} equal parts; {AGAIN}")
    if magnitude is not None:
        rows, columns = (0, 0) if kind is None else kind.fits
        sizes = [(rows, 1)] if count > 1 else [(rows, 1), (1, columns)]
        flat = magnitude[:, None] if magnitude.dim() < 2 else magnitude.flatten(1)
        if tuple(flat.shape) not in sizes:
            raise UserError(f"{path}: {module} has a DoRA scale of {list(magnitude.shape)}, which isn't read; {AGAIN}")
        magnitude = flat
    kinds = [None] * count if kind is None else kind.scaled(factor).rows(count)
    biases = [None] * count if bias is None else bias.chunk(count)
    by_column = magnitude is None or magnitude.shape[0] == 1
    magnitudes = [magnitude] * count if by_column else magnitude.chunk(count)
    return [Change(*three) for three in zip(kinds, biases, magnitudes, strict=True)]


def _misfit(change: Change, weight: tuple[int, ...], bias: tuple[int, ...] | None) -> str | None:
    """Why ``change`` does not fit a layer of this weight and bias; None: it does."""
    flat = weight[0] if weight else 1, math.prod(weight[1:])
    if change.kind is not None and change.kind.fits != flat:
        return f"for a weight of {list(change.kind.fits)}, the model's is {list(flat)}"
    if change.bias is not None and len(change.bias) != (bias or flat)[0]:
        return f"for a bias of {len(change.bias)}, the model's is {(bias or flat)[0]}"
    return None


# --- Writing ---------------------------------------------------------------------------------------------------------
def fused_pairs(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """``pairs`` of our modules by ComfyUI's names; those of what lies fused there become one, of the same product."""
    result = {}
    for theirs, ours in to_layout((f"{name}.weight" for name in pairs), "comfyui").items():
        names = [name.removesuffix(".weight") for name in ours]
        if not theirs.endswith(FUSED[1] + ".weight"):
            result[theirs.removesuffix(".weight")] = pairs[names[0]]
            continue
        stem = theirs.removesuffix(FUSED[1] + ".weight")
        parts = [pairs.get(stem + part) for part in FUSED[0]]
        there = [part for part in parts if part is not None]
        rows = there[0].up.shape[0]
        if all(part is there[0] or torch.equal(part.down, there[0].down) for part in there):
            down, ups = there[0].down, [torch.zeros_like(there[0].up) if p is None else p.up for p in parts]
        else:
            down = torch.cat([part.down for part in there])
            ups, before = [], 0
            for part in parts:
                up = down.new_zeros(rows, len(down))
                if part is not None:
                    up[:, before : before + len(part.down)] = part.up
                    before += len(part.down)
                ups.append(up)
        result[theirs.removesuffix(".weight")] = Pair(down, torch.cat(ups))
    return result
