"""The configuration of a run: dataclasses, one YAML file, and ``key.sub=value`` over it.

Every default is written here once. Numbers are per optimizer step and for all processes together, so the same file
means the same run on one card and on many.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..files import atomic_path


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
    """What is trained: a name of `freeze.POLICIES`, or a list of parameter name patterns."""

    policy: str | list[str] = "published"
    n: int = 5  # trained blocks at each end


@dataclass
class ObjectiveConfig:
    """How the noise level and the noise of a picture are drawn."""

    sigma: Literal["grid", "continuous", "logit_normal"] = "grid"
    grid: int = 500  # steps of the grid
    shift: float = 3.0
    mean: float = 0.0  # of logit_normal, before the shift
    std: float = 1.0
    uniform_share: float = 0.0  # of the pictures: their level is drawn without the shift
    noise: Literal["seed", "fresh"] = "seed"  # seed: the table's seed fixes a picture's noise for the whole run
    pyramid: float = 0.0  # weight of the loss on small copies of the picture inside the head: it learns colors sooner


@dataclass
class GridConfig:
    """Pictures of one number of tokens. Each step draws one of the grids by its share."""

    tokens: int = 4096
    batch: int = 8  # pictures of an optimizer step, all processes and accumulated passes together
    share: float = 1.0
    sigma_max: float = 1.0  # noise levels are scaled to lie below
    shift: float = 0.0  # of the noise levels; 0: the objective's
    path: str = ""  # pictures of this grid alone; empty: data.path
    head_crop: int = 0  # the head sees a window of so many tokens a side of each picture; 0: all of it
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
    max_bad_share: float = 0.01  # of pictures that can't be read
    workers: int = 4  # threads that decode pictures
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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """The configuration of a YAML file (None: all defaults) with ``key.sub=value`` over it.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong kind or out of range.
    """
    import yaml

    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise UserError(f"can't read the configuration {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"an override must read key=value, as in optim.lr=1e-4, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is no YAML") from error
        _put(values, key.split("."), value, key)
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


def _put(values: Any, path: list[str], value: Any, key: str) -> None:
    """Set ``values[a][b]... = value``; a number in the path is a place in a list."""
    *parents, last = [int(part) if part.isdigit() else part for part in path]
    try:
        for part in parents:
            if isinstance(part, str) and values.get(part) is None:
                values[part] = {}
            values = values[part]
        values[last] = value
    except (TypeError, IndexError, AttributeError, KeyError) as error:
        raise UserError(f"{key}: there is no such place in the configuration") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass, a list, a union, a literal or a plain type."""
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where or 'the configuration'} must hold keys and values, got {value!r}")
        hints = get_type_hints(kind)
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, 1)
                raise UserError(
                    f"unknown setting {_join(where, key)}; "
                    + (f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}")
                )
        return kind(**{key: _build(hints[key], v, _join(where, key)) for key, v in value.items()})
    if origin is Literal:
        choices = get_args(kind)
        if value not in choices or isinstance(value, bool):
            raise UserError(f"{where} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, got {value!r}")
        return [_build(get_args(kind)[0], v, f"{where}.{i}") for i, v in enumerate(value)]
    if origin in (Union, types.UnionType):
        kind = next((k for k in get_args(kind) if isinstance(value, get_origin(k) or k)), get_args(kind)[0])
        return _build(kind, value, where)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-5 as text
        except (TypeError, ValueError):
            pass
    elif kind is str and value is None:
        return ""
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} must be of type {kind.__name__}, got {value!r}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def check(config: Config) -> None:
    """Refuse what can't work, before anything is loaded.

    Raises:
        UserError: a value out of range, or settings that contradict each other.
    """
    positive = {
        "steps": config.steps, "accumulation": config.accumulation, "save_every": config.save_every,
        "keep": config.keep, "optim.lr": config.optim.lr, "optim.max_skipped": config.optim.max_skipped,
        "objective.shift": config.objective.shift, "objective.grid": config.objective.grid,
        "objective.std": config.objective.std, "ema.every": config.ema.every, "data.workers": config.data.workers,
        "data.prefetch": config.data.prefetch, "memory.head_mb": config.memory.head_mb,
        "log.sample_steps": config.log.sample_steps, "log.height": config.log.height, "log.width": config.log.width,
        "optim.eps": config.optim.eps,
    }  # fmt: skip
    zero_or_more = {
        "minutes": config.minutes, "freeze.n": config.freeze.n, "objective.pyramid": config.objective.pyramid,
        "optim.weight_decay": config.optim.weight_decay, "optim.warmup": config.optim.warmup,
        "optim.clip": config.optim.clip, "log.sample_every": config.log.sample_every,
    }  # fmt: skip
    for i, grid in enumerate(config.data.grids):
        positive |= {f"data.grids.{i}.{key}": getattr(grid, key) for key in ("tokens", "batch", "share", "sigma_max")}
        zero_or_more |= {f"data.grids.{i}.{key}": getattr(grid, key) for key in ("shift", "head_crop", "coarse")}
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"{name} must be positive, got {value}")
    for name, value in zero_or_more.items():
        if not value >= 0:
            raise UserError(f"{name} must not be negative, got {value}")
    shares = {
        "ema.decay": config.ema.decay, "data.caption_dropout": config.data.caption_dropout,
        "data.max_bad_share": config.data.max_bad_share, "objective.uniform_share": config.objective.uniform_share,
    }  # fmt: skip
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must lie between 0 and 1, got {value}")
    if not config.data.grids:
        raise UserError("data.grids is empty; give at least one, as in data.grids='[{tokens: 4096, batch: 8}]'")
    if config.data.max_aspect < 1:
        raise UserError(f"data.max_aspect must be at least 1 (squares only), got {config.data.max_aspect}")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"optim.betas must be two numbers in [0, 1), got {config.optim.betas}")
    if config.optim.fused and config.accumulation > 1:
        raise UserError("optim.fused updates in each backward pass, so it needs accumulation=1")
    if config.optim.fused and config.optim.clip:
        raise UserError("optim.clip needs all gradients at once; switch optim.fused or optim.clip off")
    if config.model.compute == "float32" and config.model.weights == "bfloat16":
        raise UserError("model.compute=float32 needs model.weights=float32")
    if config.parallel.hybrid and not config.parallel.fsdp:
        raise UserError("--hybrid is a way of sharding; add --fsdp")
