"""What is trained, as data: a policy is a list of parameter name patterns.

In a pattern ``{first}`` stands for each of the first n joint blocks, ``{last}`` for each of the last n; ``*`` and
``[0-4]`` are the shell's.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from ..errors import UserError
from .config import FreezeConfig

_ENDS = ["all_x_embedder.*", "layers.{first}.*", "layers.{last}.*", "local_decoder.*"]
POLICIES: dict[str, list[str]] = {
    "paper": _ENDS,
    "published": [
        *_ENDS, "noise_refiner.*", "context_refiner.*", "t_embedder.*", "cap_embedder.*", "x_pad_token",
        "cap_pad_token",
    ],
    "full": ["*"],
}  # fmt: skip


def patterns(config: FreezeConfig, n_layers: int) -> list[str]:
    """The patterns of ``config`` for a model of ``n_layers`` joint blocks, places filled in.

    Raises:
        UserError: an unknown policy.
    """
    if isinstance(config.policy, str) and config.policy not in POLICIES:
        raise UserError(
            f"freeze.policy must be one of {', '.join(POLICIES)} or a list of parameter patterns, got {config.policy!r}"
        )
    chosen = POLICIES[config.policy] if isinstance(config.policy, str) else config.policy
    n = min(config.n, n_layers)
    places = {"{first}": range(n), "{last}": range(n_layers - n, n_layers)}
    filled = []
    for pattern in chosen:
        place = next((p for p in places if p in pattern), None)
        filled += [pattern] if place is None else [pattern.replace(place, str(i)) for i in places[place]]
    return filled


def freeze(model: nn.Module, config: FreezeConfig) -> list[str]:
    """Set ``requires_grad`` of every parameter; returns the names of the trained ones.

    Raises:
        UserError: an unknown policy, or a pattern that fits no parameter.
    """
    wanted = patterns(config, len(model.layers))
    names = [name for name, _ in model.named_parameters()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"freeze.policy: no parameter is called {pattern}; names look like {names[-1]}")
    trained = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    if not trained:
        raise UserError("freeze.policy leaves nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(trained))
    return trained


def groups(names: list[str]) -> dict[str, list[str]]:
    """Parameter names by the part of the model that they belong to, blocks of one kind together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split(".")[0], []).append(name)
    return found
