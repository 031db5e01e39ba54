"""The configuration of a run: dataclasses, one YAML file, and ``key.sub=value`` over it.

Every default is written here once. Numbers are per optimizer step and for all processes together, so the same file
means the same run on one card and on many.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..files import atomic_path

MAX_FILE, MAX_BRACKETS = 1 << 20, 1000  # of a configuration


@dataclass
class ModelConfig:
    """The starting point and the precision of its weights."""

    base: str = ""  # a whole L2P checkpoint (`l2p_fast.convert init` makes one from a Z-Image)
    patch_size: int = 16  # for `--dry-run` without a base: the published model of this patch
    weights: Literal["bfloat16", "float32"] = "bfloat16"  # stored
    compute: Literal["bfloat16", "float32"] = "bfloat16"  # of matrix products
    frozen_bits: Literal[16, 8, 4] = 16  # of the linear weights of frozen blocks; 16: as ``weights`` says


@dataclass
class FreezeConfig:
    """What is trained in full: a name of `freeze.POLICIES`, or a list of parameter name patterns."""

    policy: str | list[str] = ""  # empty: published, but none with lora.rank
    n: int = 5  # trained blocks at each end


BLOCKS = "blocks"  # of `LoraConfig.targets`: attention and feed-forward of every block, whatever they are called


@dataclass
class LoraConfig:
    """Low-rank pairs over frozen linear layers, trained beside what `FreezeConfig` names."""

    rank: int = 0  # 0: none
    alpha: float = 0.0  # strength x rank; 0: the rank
    targets: list[str] = field(default_factory=lambda: [BLOCKS])  # patterns of layers' names, or of their ends


@dataclass
class ObjectiveConfig:
    """What is learned, and how the noise level and the noise of an image are drawn."""

    kind: Literal["flow", "guided", "trajectory"] = "flow"  # the images, or what the base does (`distil`)
    guidance: float = 2.0  # of the base
    substeps: int = 4  # of the base to one of ``grid`` steps: trajectory
    sigma: Literal["grid", "continuous", "logit_normal"] = "grid"
    grid: int = 500  # steps of the grid
    shift: float = 3.0
    mean: float = 0.0  # of logit_normal, before the shift
    std: float = 1.0
    uniform_share: float = 0.0  # of the images: their level is drawn without the shift
    noise: Literal["seed", "fresh"] = "seed"  # seed: the table's seed fixes an image's noise for the whole run
    pyramid: float = 0.0  # weight of the loss on small copies of the image inside the head: it learns colors sooner


@dataclass
class GridConfig:
    """Images of one number of tokens. Each step draws one of the grids by its share."""

    tokens: int = 4096
    batch: int = 8  # images of an optimizer step, all processes and accumulated passes together
    share: float = 1.0
    sigma_max: float = 1.0  # noise levels are scaled to lie below
    shift: float = 0.0  # of the noise levels; 0: the objective's
    path: str = ""  # images of this grid alone; empty: data.path
    head_crop: int = 0  # the head sees a window of so many tokens a side of each image; 0: all of it
    coarse: int = 0  # the grid finishes what a run of so many tokens a side began: its blur is learned; 0: it doesn't


@dataclass
class DataConfig:
    path: str = ""
    layout: Literal["auto", "csv", "imagefolder", "webdataset"] = "auto"
    grids: list[GridConfig] = field(default_factory=lambda: [GridConfig()])
    max_aspect: float = 1.0  # longest side over shortest of the buckets; 1: squares only
    caption_dropout: float = 0.0
    features: str = ""  # folder of cached text features; empty: in the run's folder
    text_encoder: str = ""  # folder with text_encoder/ and tokenizer/, to make missing features
    max_bad_share: float = 0.01  # of images that can't be read
    workers: int = 4  # threads that decode images
    prefetch: int = 2  # steps


@dataclass
class OptimConfig:
    kind: Literal["adamw8bit", "adamw", "torchao"] = "adamw8bit"
    lr: float = 5e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0  # steps
    rounding: Literal["stochastic", "masters", "nearest"] = "stochastic"  # of bf16 weights
    fused: bool = False  # update a tensor as soon as its gradient is there: gradients never coexist
    clip: float = 0.0  # norm of all gradients; 0: no clipping
    offload: bool = False  # keep the states in CPU memory
    max_skipped: int = 10  # steps in a row whose gradient is not finite


@dataclass
class EMAConfig:
    decay: float = 0.0  # 0: none
    every: int = 1  # steps between two updates
    device: Literal["", "cpu"] = ""  # cpu: keep it in CPU memory


@dataclass
class MemoryConfig:
    checkpointing: bool = True  # recompute each block in the backward pass
    offload_checkpoints: bool = False  # keep the inputs of the blocks in CPU memory
    head_mb: float = 256.0  # working memory of the Detailer Head


@dataclass
class ParallelConfig:
    fsdp: bool = False
    hybrid: bool = False  # shard within a node, replicate across nodes


@dataclass
class LogConfig:
    board: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    sample_every: int = 0  # steps between sample sheets; 0: none
    prompts: list[str] = field(default_factory=list)
    sample_steps: int = 30
    guidance: float = 2.0
    height: int = 1024
    width: int = 1024


@dataclass
class GateConfig:
    """A score of the images of log.prompts; the checkpoint with the best one is kept."""

    every: int = 0  # steps between two scores; 0: none
    by: Literal["grid", "clip", "fid"] = "grid"  # patch grid (nearest to none), CLIP score (highest), FID (lowest)
    weights: str = ""  # clip: a CLIP's folder; fid: Inception's weights
    reference: str = ""  # fid: folder of images to compare with


@dataclass
class Config:
    run: str = ""  # folder of everything that the run writes
    steps: int = 10000
    minutes: float = 0.0  # stop (and end the schedule) after this training time; 0: no limit
    accumulation: int = 1  # passes of an optimizer step
    seed: int = 0
    device: str = ""  # cuda if there is one
    save_every: int = 500
    keep: int = 2  # checkpoints
    model: ModelConfig = field(default_factory=ModelConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self):
        if self.freeze.policy == "":
            self.freeze.policy = "none" if self.lora.rank else "published"


ABOVE_ZERO = None
# The lowest and the highest value of every number; a list's place is a star.
BOUNDS: dict[str, tuple[float | None, float]] = {
    "steps": (1, 99_999_999), "minutes": (0, 1e7), "accumulation": (1, 65536), "seed": (-(2**63), 2**64 - 1),
    "save_every": (1, 99_999_999), "keep": (1, 10_000),
    "model.patch_size": (1, 1024), "freeze.n": (0, 10_000), "lora.rank": (0, 65536), "lora.alpha": (0, 1e6),
    "objective.guidance": (0, 1000), "objective.substeps": (1, 1000),
    "objective.grid": (1, 1_000_000), "objective.shift": (ABOVE_ZERO, 1000), "objective.mean": (-100, 100),
    "objective.std": (ABOVE_ZERO, 100), "objective.uniform_share": (0, 1), "objective.pyramid": (0, 1e6),
    "data.grids.*.tokens": (1, 2**20), "data.grids.*.batch": (1, 65536), "data.grids.*.share": (ABOVE_ZERO, 1e6),
    "data.grids.*.sigma_max": (ABOVE_ZERO, 1), "data.grids.*.shift": (0, 1000), "data.grids.*.head_crop": (0, 1024),
    "data.grids.*.coarse": (0, 1024), "data.max_aspect": (1, 64), "data.caption_dropout": (0, 1),
    "data.max_bad_share": (0, 1), "data.workers": (1, 256), "data.prefetch": (1, 64),
    "optim.lr": (ABOVE_ZERO, 10), "optim.betas.*": (0, 1 - 1e-12), "optim.eps": (ABOVE_ZERO, 1),
    "optim.weight_decay": (0, 1000), "optim.warmup": (0, 99_999_999), "optim.clip": (0, 1e9),
    "optim.max_skipped": (1, 1_000_000), "ema.decay": (0, 1), "ema.every": (1, 1_000_000),
    "memory.head_mb": (ABOVE_ZERO, 1e6), "log.sample_every": (0, 99_999_999), "log.sample_steps": (1, 10_000),
    "log.guidance": (0, 1000), "log.height": (1, 65536), "log.width": (1, 65536), "gate.every": (0, 99_999_999),
}  # fmt: skip


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """The configuration of a YAML file (None: all defaults) with ``key.sub=value`` over it.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong kind or out of range.
    """
    values: Any = {}
    if path is not None:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise UserError(f"the configuration {path} is not a file; give the YAML file of a run")
        try:
            with open(path, "rb") as file:
                text = file.read(MAX_FILE + 1)
        except (OSError, ValueError) as error:
            raise UserError(f"can't read the configuration {path}: {getattr(error, 'strerror', error)}") from error
        if len(text) > MAX_FILE:
            raise UserError(f"the configuration {path} has more than {MAX_FILE:,} bytes; give the YAML file of a run")
        values = _yaml(text, f"{path} is not YAML") or {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"an override must read key=value, as in optim.lr=1e-4, got {override!r}")
        _put(values, key.split("."), _yaml(text, f"{reprlib.repr(override)}: the value is not YAML"), key)
    config = _build(Config, values, "")
    check(config)
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values."""
    return dataclasses.asdict(config)


def write_config(config: Config, path: Path) -> None:
    """Write every setting to a YAML file that `load_config` reads."""
    import yaml

    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(as_dict(config), sort_keys=False))


def _yaml(text: str | bytes, what: str) -> Any:
    """``text`` as plain values; `UserError` with ``what`` if it is none."""
    import yaml

    try:
        if sum(map(text.count, (b"[", b"{") if isinstance(text, bytes) else "[{")) > MAX_BRACKETS:
            raise ValueError(f"over {MAX_BRACKETS:,} brackets")  # deep nesting takes PyYAML long
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{what}: {_short(str(error) or type(error).__name__)}") from error


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "..."


def _put(values: Any, path: list[str], value: Any, key: str) -> None:
    """Set ``values[a][b]... = value``; a number in the path is a place in a list."""
    try:
        *parents, last = [int(part) if part.isdecimal() else part for part in path]
        for part in parents:
            if isinstance(part, str) and values.get(part) is None:
                values[part] = {}
            values = values[part]
        values[last] = value
    except (TypeError, IndexError, AttributeError, KeyError, ValueError) as error:
        raise UserError(f"{_short(key)}: there is no such place in the configuration") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass, a list, a union, a literal or a plain type."""
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where or 'the configuration'} must hold keys and values, got {reprlib.repr(value)}")
        hints = get_type_hints(kind)
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(str(key)[:80], hints, 1)
                raise UserError(
                    f"unknown setting {_short(_join(where, key))}; "
                    + (f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}")
                )
        return kind(**{key: _build(hints[key], v, _join(where, key)) for key, v in value.items()})
    if origin is Literal:
        choices = get_args(kind)
        if isinstance(value, (bool, list, dict)) or value not in choices:
            raise UserError(f"{where} must be one of {', '.join(repr(c) for c in choices)}, got {reprlib.repr(value)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, got {reprlib.repr(value)}")
        return [_build(get_args(kind)[0], v, f"{where}.{i}") for i, v in enumerate(value)]
    if origin in (Union, types.UnionType):
        kind = next((k for k in get_args(kind) if isinstance(value, get_origin(k) or k)), get_args(kind)[0])
        return _build(kind, value, where)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-5 as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind is str and value is None:
        return ""
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        if kind is str and ("\0" in value or not value.isascii() and value != value.encode(errors="replace").decode()):
            raise UserError(f"{where} must be text of whole characters, got {reprlib.repr(value)}")
        return value
    raise UserError(f"{where} must be of type {kind.__name__}, got {reprlib.repr(value)}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def check(config: Config) -> None:
    """Refuse what can't work, before anything is loaded.

    Raises:
        UserError: a value out of range, or settings that contradict each other.
    """
    for name, value in _numbers(as_dict(config), ""):
        lowest, highest = BOUNDS[".".join("*" if part.isdecimal() else part for part in name.split("."))]
        if lowest is ABOVE_ZERO or lowest == 1 and isinstance(value, int):
            fits, wanted = value > 0, "must be positive"
        elif lowest == 0:
            fits, wanted = value >= 0, "must not be negative"
        else:
            fits, wanted = value >= lowest, f"must be at least {lowest}"
        if not fits or not value <= highest:
            wanted = wanted if not fits else f"must be at most {highest:,}"
            raise UserError(f"{name} {wanted}, got {_short(repr(value))}")
    if not config.data.grids:
        raise UserError("data.grids is empty; give at least one, as in data.grids='[{tokens: 4096, batch: 8}]'")
    if config.lora.rank and not config.lora.targets:
        raise UserError(f"lora.targets is empty; name layers, as in lora.targets='[to_q, to_v]', or give [{BLOCKS}]")
    if config.objective.kind != "flow":
        check_distilling(config)
    if len(config.optim.betas) != 2:
        raise UserError(f"optim.betas must be two numbers in [0, 1), got {len(config.optim.betas)}")
    if config.optim.fused and config.accumulation > 1:
        raise UserError("optim.fused updates in each backward pass, so it needs accumulation=1")
    if config.optim.fused and config.optim.clip:
        raise UserError("optim.clip needs all gradients at once; switch optim.fused or optim.clip off")
    if config.model.compute == "float32" and config.model.weights == "bfloat16":
        raise UserError("model.compute=float32 needs model.weights=float32")
    gate = config.gate
    if gate.every and not config.log.prompts:
        raise UserError("gate.every scores the images of log.prompts; give some, as in log.prompts='[a red star]'")
    if gate.every and gate.by != "grid" and not gate.weights:
        raise UserError(f"gate.by={gate.by} needs gate.weights: {'a CLIP folder' if gate.by == 'clip' else 'a file'}")
    if gate.every and gate.by == "fid" and (not gate.reference or len(config.log.prompts) < 2):
        raise UserError("gate.by=fid needs gate.reference, a folder of images, and 2 of log.prompts or more")
    if config.parallel.hybrid and not config.parallel.fsdp:
        raise UserError("--hybrid is a way of sharding; add --fsdp")


def check_distilling(config: Config) -> None:
    """Refuse what a model that learns of itself can't have.

    Raises:
        UserError: it has.
    """
    kind, objective = f"objective.kind={config.objective.kind}", config.objective
    if not config.lora.rank or config.freeze.policy != "none":
        raise UserError(
            f"{kind} learns from the base, which must stay beside what is trained; give lora.rank, as in lora.rank=32, "
            "and freeze.policy=none"
        )
    if objective.pyramid:
        raise UserError(f"{kind} has no images for objective.pyramid; leave that out")
    if objective.kind == "trajectory":
        if objective.sigma != "grid" or objective.uniform_share:
            raise UserError(f"{kind} learns the steps of objective.grid; take objective.sigma=grid, uniform_share=0")
        plain = GridConfig()
        for number, grid in enumerate(config.data.grids):
            for name in ("sigma_max", "shift", "head_crop", "coarse"):
                if getattr(grid, name) != getattr(plain, name):
                    raise UserError(
                        f"{kind} follows whole images through all of the schedule; leave data.grids.{number}.{name} out"
                    )


def _numbers(values: Any, where: str) -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number in plain ``values`` but those of a choice."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _numbers(value, _join(where, key))
    elif isinstance(values, int | float) and not isinstance(values, bool) and where != "model.frozen_bits":
        yield where, values
