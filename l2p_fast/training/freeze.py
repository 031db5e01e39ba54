"""What is trained, as data: a policy is a list of parameter name patterns.

    paper       what a pixel model has of its own, and the first and last n blocks of the main stacks
    published   all but the blocks between
    full        everything
    pixels      what a pixel model has of its own
    none        nothing: for a LoRA alone

The main stacks are a model's own to tell (`PixelModel.main_blocks`): all blocks but refiners, in order of execution,
over several stacks where there are several. In a pattern ``{first}`` stands for the name of each of the first n blocks,
``{last}`` for each of the last n (``{first}.*``; ``layers.{first}.*`` for those of one stack); ``*`` and ``[0-4]`` are
the shell's.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from ..errors import UserError
from ..models.pixel import PixelModel
from .config import FreezeConfig

POLICIES = ("paper", "published", "full", "pixels", "none")


def patterns(config: FreezeConfig, model: PixelModel) -> list[str]:
    """The patterns of ``config`` for ``model``, places filled in.

    Raises:
        UserError: an unknown policy.
    """
    main = model.main_blocks()
    n = min(config.n, len(main))
    chosen = config.policy
    if isinstance(chosen, str):
        if chosen not in POLICIES:
            raise UserError(
                f"freeze.policy must be one of {', '.join(POLICIES)} or a list of parameter patterns, got {chosen!r}"
            )
        own = [f"{part}*" for part in model.pixel_parts]
        ends = [*own, "{first}.*", "{last}.*"]
        rest = [name for name, _ in model.named_parameters() if not name.startswith(tuple(f"{b}." for b in main))]
        lists = {"paper": ends, "published": [*ends, *rest], "full": ["*"], "pixels": own, "none": []}
        chosen = lists[chosen]
    places = {"{first}": main[:n], "{last}": main[len(main) - n :]}
    filled = []
    for pattern in chosen:
        place = next((p for p in places if p in pattern), None)
        filled += [pattern] if place is None else _fill(pattern, place, places[place])
    return filled


def _fill(pattern: str, place: str, blocks: list[str]) -> list[str]:
    """``pattern`` with each of ``blocks`` in its ``place``; a stack's name before it chooses the blocks of that."""
    before, after = pattern.split(place, 1)
    stack = before.removesuffix(".")
    chosen = [block for block in blocks if not before or block.rpartition(".")[0] == stack]
    return [f"{block}{after}" for block in chosen]


def freeze(model: PixelModel, config: FreezeConfig, beside_lora: bool = False) -> list[str]:
    """Set ``requires_grad`` of every parameter; returns the names of the trained ones.

    Raises:
        UserError: an unknown policy, a pattern that fits no parameter, or nothing to train (but ``beside_lora``).
    """
    wanted = patterns(config, model)
    names = [name for name, _ in model.named_parameters()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"freeze.policy: no parameter is called {pattern}; names look like {names[-1]}")
    chosen = (name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted))
    trained = {name for name in chosen if not name.startswith(model.idle)}
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
