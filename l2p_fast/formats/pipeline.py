"""A pipeline folder's model_index.json and scheduler, as plain checked values. Loads no torch and no diffusers.

What classes a folder names is compared with ours and never imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .header import load_json

_CLASSES = {
    "transformer": ("L2PTransformer2DModel",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
_DEFAULTS = {
    "default_steps": (int, 1, 10_000),
    "default_guidance_scale": (float, 0, 1000),
    "coarse_size": (int, 0, 4096),
    "coarse_strength": (float, 0, 1),
}
_SCHEDULER = {
    "num_train_timesteps": (int, 1, 1_000_000),
    "shift": (float, 1e-3, 1000),
    "stochastic_sampling": (bool, 0, 1),
}


class PipelineFolder(NamedTuple):
    """The pipeline's own settings, and those of its scheduler."""

    defaults: dict[str, Any]
    scheduler: dict[str, Any]


def read_pipeline(folder: str | Path) -> PipelineFolder:
    """What a folder saved by `L2PPipeline` says beside its weights.

    Raises:
        UserError: damaged, a component of another class, or a value out of range.
    """
    folder = Path(folder)
    index, path = load_json(folder / "model_index.json"), folder / "model_index.json"
    for name, known in _CLASSES.items():
        named = index.get(name)
        kind = named[-1] if isinstance(named, list) and named else None
        if kind not in known and not (kind is None and name in ("text_encoder", "tokenizer")):
            raise UserError(f"{path}: its {name} is {named!r:.80}; wanted a {known[0]}")
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = load_json(scheduler_path)
    if scheduler.get("use_dynamic_shifting"):
        raise UserError(f"{scheduler_path}: use_dynamic_shifting is of latent models; wanted a fixed shift")
    return PipelineFolder(_checked(index, _DEFAULTS, path), _checked(scheduler, _SCHEDULER, scheduler_path))


def _checked(found: dict[str, Any], known: dict[str, tuple[type, float, float]], path: Path) -> dict[str, Any]:
    checked = {}
    for name, (kind, low, high) in known.items():
        value = found.get(name)
        if value is None:
            continue
        if type(value) not in ((int, float) if kind is float else (kind,)) or not low <= value <= high:
            wanted = "true or false" if kind is bool else f"a number from {low:g} to {high:g}"
            raise UserError(f"{path}: {name} must be {wanted}, got {value!r:.40}; write the folder again")
        checked[name] = kind(value)
    return checked
