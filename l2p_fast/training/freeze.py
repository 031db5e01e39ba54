"""What is trained, as data: a policy is a list of parameter name patterns.

    paper       what a pixel model has of its own, and the first and last n blocks of the main stack
    published   all but the blocks between
    full        everything
    pixels      what a pixel model has of its own
    none        nothing: for a LoRA alone

The main stack is the model's last one. In a pattern ``{first}`` stands for each of its first n blocks, ``{last}`` for
each of its last n; ``*`` and ``[0-4]`` are the shell's.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from ..errors import UserError
from ..models.zimage import L2PTransformer2DModel
from .config import FreezeConfig

POLICIES = ("paper", "published", "full", "pixels", "none")


def patterns(config: FreezeConfig, model: L2PTransformer2DModel) -> list[str]:
    """The patterns of ``config`` for ``model``, places filled in.

    Raises:
        UserError: an unknown policy.
    """
    *_, last = (name for name, _ in model.blocks())
    stack, _, number = last.rpartition(".")
    chosen = config.policy
    if isinstance(chosen, str):
        if chosen not in POLICIES:
            raise UserError(
                f"freeze.policy must be one of {', '.join(POLICIES)} or a list of parameter patterns, got {chosen!r}"
            )
        own = [f"{part}*" for part in model.pixel_parts]
        ends = [*own, f"{stack}.{{first}}.*", f"{stack}.{{last}}.*"]
        rest = [name for name, _ in model.named_parameters() if not name.startswith(f"{stack}.")]
        lists = {"paper": ends, "published": [*ends, *rest], "full": ["*"], "pixels": own, "none": []}
        chosen = lists[chosen]
    count = int(number) + 1
    n = min(config.n, count)
    places = {"{first}": range(n), "{last}": range(count - n, count)}
    filled = []
    for pattern in chosen:
        place = next((p for p in places if p in pattern), None)
        filled += [pattern] if place is None else [pattern.replace(place, str(i)) for i in places[place]]
    return filled


def freeze(model: L2PTransformer2DModel, config: FreezeConfig, beside_lora: bool = False) -> list[str]:
    """Set ``requires_grad`` of every parameter; returns the names of the trained ones.

    Raises:
        UserError: an unknown policy, a pattern that fits no parameter, or nothing to train (but ``beside_lora``).
    """
    wanted = patterns(config, model)
    names = [name for name, _ in model.named_parameters()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"freeze.policy: no parameter is called {pattern}; names look like {names[-1]}")
    trained = {name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)}
    if not trained and not beside_lora:
        raise UserError("freeze.policy leaves nothing to train; give another, or lora.rank")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return [name for name in names if name in trained]


def groups(names: list[str]) -> dict[str, list[str]]:
    """Parameter names by the part of the model that they belong to, blocks of one kind together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split(".")[0], []).append(name)
    return found
