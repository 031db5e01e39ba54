"""A training from its configuration to its weights: the loop, top to bottom, over the parts in this folder.

A run lives in one folder and goes on where it was when it is started again.
"""

from __future__ import annotations

import math
import reprlib
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..formats.checkpoint import Checkpoint
from ..formats.values import is_finite
from ..models.pixel import PixelModel
from . import distil
from . import state as checkpoints
from .build import autocast, build, check_base
from .config import Config, LoraConfig, as_dict, write_config
from .data import Batch, Features, Stream, TrainingImage, list_images, make_buckets, make_features
from .ema import EMA
from .image_gate import Gate
from .monitor import Monitor, free_memory
from .objective import SIGMA_BUCKETS, losses
from .optim import AdamW
from .pairs import write_trained
from .parallel import Workers, local, replicas
from .run import RunFolder
from .sheets import Sheets, side_by_side
from .state import RunState

# A checkpoint can only go on under the settings that gave its tensors their meaning.
FIXED = ("seed", "model.base", "model.weights", "freeze", "lora", "optim.kind", "optim.rounding", "ema.decay",
         "data.path", "data.layout", "data.max_aspect")  # fmt: skip


def train(config: Config, workers: Workers, resume: str = "auto") -> bool:
    """Train until ``config.steps`` or ``config.minutes``, or until SIGTERM or SIGINT; the state is saved then.

    Returns whether the run is finished: not stopped by a signal.

    Raises:
        UserError: a mistake that the user can fix; earlier checkpoints are untouched.
    """
    with RunFolder(config.run, workers) as run, run.telling_what_is_kept():
        return _train(config, workers, run, resume)


def _train(config: Config, workers: Workers, run: RunFolder, resume: str) -> bool:
    check_base(config)
    images, features = open_data(config, workers)  # before the model: the text encoder needs the device, too
    model, trained = build(config, workers)
    sheets = Sheets(model, features, config, workers)
    optimizer = AdamW(trained, config.optim, config.seed)
    average = EMA(trained, config.ema)
    stream = open_stream(config, images, model, workers)
    place, state, notes = run.find(resume)
    if place is not None:
        check_same(config, state.config, place)
        checkpoints.load(place, tensors_of(optimizer, average))
        stream.restore(state.data)
        optimizer.steps = state.updates
        state.give_rng()
    if config.optim.fused:
        optimizer.fuse()
    if workers.first:
        write_config(config, run.path / "config.yaml")
    copies = max((replicas(p) for p in trained.values()), default=1)
    gate = Gate(run.path, config, model.patch_size, state.step, workers)
    monitor = Monitor(run.path, config, state.step, workers)
    for note in notes:
        monitor.say(f"warning: {note}")
    monitor.say(
        f"{f'resumed from {place}' if place else 'a new run'} in {run.path}, step {state.step} of {config.steps}"
    )

    def save() -> int:
        """The step whose checkpoint is the last; what isn't finite is not saved."""
        if state.skipped_in_row:  # the weights are those of an earlier step: the next good one is saved
            return saved
        tensors = tensors_of(optimizer, average)
        broken = sorted(workers.union({n for n, value in tensors.items() if not is_finite(local(value))}))
        if broken:
            raise UserError(f"step {state.step}: {broken[0]} is not finite; {last_good(run)}; lower optim.lr")
        state.updates, state.data = optimizer.steps, stream.state()
        state.config, state.world = as_dict(config), workers.world
        state.take_rng()
        checkpoints.save(run.path, tensors, state, config.keep, workers, gate.best)
        return state.step

    saved = state.step if place is not None and place == run.last() else -1
    mark = time.monotonic()
    with monitor, Halt() as halt:
        while state.step < config.steps and not halt.agreed and not out_of_time(config, state):
            batches = stream.next()
            optimizer.lr = config.optim.lr * schedule(config, state.step, state.seconds)
            of_sigma = backward(model, batches, features, config, workers.device)
            squared, left_alone = optimizer.finish() if config.optim.fused else (optimizer.squared_norm(), 0)
            took, mark = time.monotonic() - mark, time.monotonic()
            told = Told.by_all(workers, of_sigma, squared / copies, left_alone, halt.asked, stream.new_bad(), took)
            if not config.optim.fused:
                if told.finite:
                    optimizer.clip(told.norm, config.optim.clip)
                    optimizer.step()
                else:
                    optimizer.drop()
            if told.finite:
                average.update(optimizer.steps)
                state.skipped_in_row = 0
            else:
                state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
            if state.skipped_in_row >= config.optim.max_skipped:
                raise UserError(
                    f"step {state.step + 1}: the loss or a gradient was not finite {state.skipped_in_row} steps in a "
                    f"row; {last_good(run)}; lower optim.lr, or set optim.clip"
                )
            new_bad = stream.learn(told.bad)
            state.step += 1
            state.seconds += told.seconds
            halt.agreed = told.stop
            run.check()
            monitor.step(
                state.step, loss=told.loss, of_sigma=told.of_sigma, norm=told.norm, lr=optimizer.lr,
                epoch=stream.epoch, seconds=told.seconds, skipped=state.skipped, bad=len(stream.bad),
                bad_names=new_bad,
            )  # fmt: skip
            if state.step % config.save_every == 0 or gate.due(state.step):
                saved = save()
            if sheets.due(state.step) or gate.due(state.step):
                drawn = sheets.draw(lambda: halt.agree(workers), monitor.say)
                if drawn and gate.due(state.step) and saved == state.step:
                    score = gate.judge(state.step, drawn, monitor.say)
                    if score is not None:
                        monitor.tell(state.step, f"gate/{gate.by}", score)
                        checkpoints.prune(run.path, config.keep, gate.best)
                if drawn and sheets.due(state.step) and workers.first:
                    monitor.show(state.step, side_by_side(drawn))
        if saved != state.step:
            saved = save()
        if state.skipped_in_row:
            monitor.say(f"the last {state.skipped_in_row} steps were skipped as not finite; {last_good(run)}")
    if halt.agreed:
        kept = f"step {saved} is saved" if saved >= 0 else "nothing is saved yet"
        monitor.say(f"stopped by a signal; {kept}, the same command goes on")
    elif workers.first:
        export(run, average, gate.best)
    return not halt.agreed


# --- A step ----------------------------------------------------------------------------------------------------------
def backward(
    model: nn.Module, batches: Sequence[Batch], features: Features, config: Config, device: torch.device
) -> Tensor:
    """The gradients of a step's passes; -> (2, buckets) sums of losses by noise level, and how many."""
    of_sigma = torch.zeros(2, SIGMA_BUCKETS, dtype=torch.float64)
    for number, batch in enumerate(batches, 1):
        if config.parallel.fsdp:  # gradients are exchanged once a step
            model.set_requires_gradient_sync(number == len(batches))
        each = passes(model, batch, features, config, device)
        (each.mean() / len(batches)).backward()
        bucket = (batch.sigma * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
        of_sigma[0].index_add_(0, bucket, each.detach().double().cpu())
        of_sigma[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
    return of_sigma


def passes(model: nn.Module, batch: Batch, features: Features, config: Config, device: torch.device) -> Tensor:
    """(B,) losses of one forward pass."""
    texts = [features[prompt].to(device) for prompt in batch.prompts]
    pixels, noise, sigma = (x.to(device, non_blocking=True) for x in (batch.pixels, batch.noise, batch.sigma))
    with autocast(config, device):
        if config.objective.kind != "flow":
            empty = features[""].to(device)
            return distil.losses(model, pixels, noise, sigma, texts, empty, config.objective, batch.windows)
        return losses(model, pixels, noise, sigma, texts, batch.windows, config.objective.pyramid)


@dataclass
class Told:
    """What all processes know of a step, the same on each.

    Attributes:
        of_sigma: (2, buckets) sums of losses by noise level, and how many.
        loss: their mean.
        norm: of the gradient.
        finite: whether both are, and no tensor was left alone.
        stop: whether any process is asked to stop.
        bad: names of unreadable images that were found.
        seconds: the mean of the processes' times, so that the schedule may depend on it.
    """

    of_sigma: Tensor
    loss: float
    norm: float
    finite: bool
    stop: bool
    bad: set[str]
    seconds: float

    @classmethod
    def by_all(
        cls, workers: Workers, of_sigma: Tensor, squared: float, left_alone: int, asked: bool, bad: set[str],
        took: float,
    ) -> Told:  # fmt: skip
        sums = workers.sum([*of_sigma.flatten(), squared, left_alone, asked, len(bad), took])
        of_sigma = torch.tensor(sums[: 2 * SIGMA_BUCKETS]).view(2, -1)
        squared, left_alone, asked, found, took = sums[2 * SIGMA_BUCKETS :]
        loss = (of_sigma[0].sum() / of_sigma[1].sum()).item()
        finite = math.isfinite(loss) and math.isfinite(squared) and not left_alone
        names = workers.union(bad) if found else set()
        return cls(of_sigma, loss, math.sqrt(max(squared, 0.0)), finite, asked > 0, names, took / workers.world)


def schedule(config: Config, step: int, seconds: float) -> float:
    """The share of the learning rate at a step: warm-up, then constant, or falling to zero."""
    warm = min(1.0, (step + 1) / config.optim.warmup) if config.optim.warmup else 1.0
    progress = min(1.0, max(step / config.steps, seconds / (60 * config.minutes) if config.minutes else 0.0))
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return warm * falling[config.optim.schedule]


def out_of_time(config: Config, state: RunState) -> bool:
    return config.minutes > 0 and state.seconds >= config.minutes * 60


class Halt:
    """A wish to stop, by SIGTERM (preemption) or SIGINT; `agreed` once all processes know of it. Use as a context."""

    def __init__(self):
        self.asked, self.agreed = False, False

    def __enter__(self) -> Halt:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, workers: Workers) -> bool:
        """Whether any process is asked to stop; all call this together."""
        self.agreed = any(workers.sum([self.asked]))
        return self.agreed

    def _ask(self, number: int, frame) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C doesn't wait


# --- Before and after ------------------------------------------------------------------------------------------------
def open_data(config: Config, workers: Workers) -> tuple[list[TrainingImage], Features]:
    """The images and their text features, made where they are missing (each process its part)."""
    images = workers.share(list_images(config.data) if workers.first else None)
    features = Features(config.data.features or Path(config.run) / "features")
    unprompted = config.data.caption_dropout or config.log.sample_every or config.gate.every
    empty = [""] if unprompted or config.objective.kind != "flow" else []
    missing = features.missing([*empty, *(image.prompt for image in images), *config.log.prompts])
    workers.wait()
    if missing:
        mine = missing[workers.rank :: workers.world]
        if mine or not config.data.text_encoder:
            base = Checkpoint(config.model.base)
            make_features(
                features, mine or missing, config.data.text_encoder, workers.device, base.layout.source.name,
                base.config.get("text_tokens"),
            )  # fmt: skip
        workers.wait()
        features.refresh()
        free_memory(workers.device)
    return images, features


def open_stream(config: Config, images: list[TrainingImage], model: PixelModel, workers: Workers) -> Stream:
    """The stream of batches for ``model``."""
    buckets, bad = None, set()
    if workers.first:
        step = model.size_multiple // model.patch_size
        buckets = make_buckets(images, config.data, step, bad, config.data.workers)
    buckets, bad = workers.share((buckets, bad))
    return Stream(
        images, buckets, config.data, config.objective, model.patch_size, config.seed, workers.rank, workers.world,
        config.accumulation, bad,
    )  # fmt: skip


def check_same(config: Config, other: Mapping, place: Path) -> None:
    """Refuse a checkpoint whose tensors mean something else under this configuration."""
    ours = as_dict(config)
    for key in FIXED:
        here, there = ours, {"lora": as_dict(LoraConfig()), **other}  # older ones name none
        for part in key.split("."):
            here, there = here[part], there.get(part) if isinstance(there, Mapping) else None
        if here != there:
            raise UserError(
                f"the checkpoint {place} was made with {key} = {reprlib.repr(there)}, now it is {here!r}; use that, "
                "or another run folder"
            )


def tensors_of(optimizer: AdamW, average: EMA) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name; the storage is shared."""
    parts = {
        checkpoints.MODEL: {name: p.detach() for name, p in optimizer.named.items()},
        checkpoints.OPTIM: optimizer.tensors(),
        checkpoints.EMA: average.tensors(),
    }
    return {prefix + name: value for prefix, tensors in parts.items() for name, value in tensors.items()}


def last_good(run: RunFolder) -> str:
    last = run.last()
    return f"the last good checkpoint is {last}" if last else "no checkpoint was saved"


def export(run: RunFolder, average: EMA, best: Path | None = None) -> None:
    """Write the trained tensors and pairs (`l2p_fast.convert merge` puts them over the base).

    Averaged ones, and those of the ``best`` checkpoint, go beside them.
    """
    last = run.last()
    if last is None:
        raise UserError("no step had a finite loss and gradient: nothing is saved; lower optim.lr, or set optim.clip")
    for ending, place, averaged in (("", last, False), ("-ema", last, True), ("-best", best, False)):
        if place is not None and (not averaged or average.average):
            write_trained(checkpoints.TrainedTensors(place, averaged), run.path, ending)
