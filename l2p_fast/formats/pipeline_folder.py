"""A pipeline folder's model_index.json and scheduler, as plain checked values. Loads no torch and no diffusers.

The classes that a folder names are never imported: the tensors tell what a model is, and of the scheduler there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..variants import SHIFT
from .folder import CONFIG_LIMIT
from .header import load_json

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_DEFAULTS = {
    "default_steps": (int, 1, 10_000),
    "default_guidance_scale": (float, 0, 1000),
    "coarse_size": (int, 0, 4096),
    "coarse_strength": (float, 0, 1),
    "full_guidance_scale": (float, 0, 1000),
}


class PipelineFolder(NamedTuple):
    """The pipeline's own settings, and its noise schedule's shift."""

    defaults: dict[str, Any]
    shift: float


def read_pipeline(folder: str | Path) -> PipelineFolder:
    """What a folder saved by `L2PPipeline` says beside its weights.

    Raises:
        UserError: damaged, a component of another class, or a value out of range.
    """
    path = Path(folder) / "model_index.json"
    index = load_json(path, CONFIG_LIMIT)
    named = index.get("scheduler")
    if named is not None and not (isinstance(named, list) and named and named[-1] == SCHEDULER):
        raise UserError(f"{path}: its scheduler is {named!r:.80}; L2P is sampled with {SCHEDULER}")
    defaults = _checked(index, _DEFAULTS, path)
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    scheduler = load_json(path, CONFIG_LIMIT) if path.exists() else {}
    for name in ("use_dynamic_shifting", "stochastic_sampling", "invert_sigmas"):
        if scheduler.get(name):
            raise UserError(f"{path}: {name} is set, which L2P's schedule has not; use {name}=false")
    shift = _checked(scheduler, {"shift": (float, 1e-3, 1000)}, path).get("shift", SHIFT)
    return PipelineFolder(defaults, shift)


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
