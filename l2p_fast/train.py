"""``python -m l2p_fast.train CONFIG.yaml [key=value ...]``: train an L2P model.

The loop below reads from top to bottom; what it is made of is in `l2p_fast.training`. A run lives in one folder and
goes on where it was when the same command is given again. One process by default; ``torchrun --nproc-per-node N -m
l2p_fast.train ... --fsdp`` shares the model among N.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, run_cli
from .files import atomic_path
from .models.zimage import L2PTransformer2DModel
from .training import state as checkpoints
from .training.build import autocast, build, check_base
from .training.config import Config, as_dict, check, load_config, write_config
from .training.data import Features, Picture, Stream, list_pictures, make_buckets, make_features
from .training.ema import EMA
from .training.memory import plan
from .training.monitor import Monitor, free_memory, sample_sheet
from .training.objective import SIGMA_BUCKETS, losses
from .training.optim import AdamW
from .training.parallel import Workers, replicas, start

# A checkpoint can only go on under the settings that gave its tensors their meaning.
FIXED = ("seed", "model.base", "model.weights", "freeze", "optim.kind", "optim.rounding", "ema.decay", "data.path",
         "data.layout", "data.max_aspect")  # fmt: skip


def train(config: Config, workers: Workers, resume: str = "auto") -> bool:
    """Train until ``config.steps`` or ``config.minutes``, or until SIGTERM or SIGINT; the state is saved then.

    Returns whether the run is finished: not stopped by a signal.

    Raises:
        UserError: what the user can mend; earlier checkpoints are untouched.
    """
    folder = open_run(config)
    check_base(config)
    pictures, features = open_data(config, workers)  # before the model: the text encoder needs the device, too
    model, trained = build(config, workers)
    check_sheet(config, model)
    optimizer = AdamW(trained, config.optim, config.seed)
    average = EMA(trained, config.ema)
    stream = open_stream(config, pictures, model, workers)
    place = find_checkpoint(folder, resume)
    done, skipped, skipped_in_row, seconds = 0, 0, 0, 0.0
    if place is not None:
        state = checkpoints.read_state(place)
        check_same(config, state["config"], place)
        checkpoints.load(place, tensors_of(optimizer, average), workers)
        stream.restore(state["data"])
        done, optimizer.steps = state["step"], state["updates"]
        skipped, skipped_in_row, seconds = state["skipped"], state["skipped_in_row"], state["seconds"]
        torch.set_rng_state(torch.tensor(state["rng"], dtype=torch.uint8))
    if config.optim.fused:
        optimizer.fuse()
    if workers.first:
        write_config(config, folder / "config.yaml")
    copies = max((replicas(p) for p in trained.values()), default=1)
    monitor = Monitor(folder, config, done, workers)
    monitor.say(f"{'resumed from ' + str(place) if place else 'a new run'} in {folder}, step {done} of {config.steps}")

    def save() -> Path:
        state = {
            "step": done, "updates": optimizer.steps, "skipped": skipped, "skipped_in_row": skipped_in_row,
            "seconds": seconds, "data": stream.state(), "rng": torch.get_rng_state().tolist(),
            "config": as_dict(config), "world": workers.world,
        }  # fmt: skip
        return checkpoints.save(folder, tensors_of(optimizer, average), state, config.keep, workers)

    saved = done if place is not None else -1
    mark = time.monotonic()
    with monitor, Stop() as stop:
        while done < config.steps and not stop.agreed and not (config.minutes and seconds >= config.minutes * 60):
            batches = stream.next()
            optimizer.lr = config.optim.lr * schedule(config, done, seconds)
            of_sigma = torch.zeros(2, SIGMA_BUCKETS, dtype=torch.float64)  # sums of losses, and how many
            for number, batch in enumerate(batches, 1):
                if config.parallel.fsdp:  # gradients are exchanged once a step
                    model.set_requires_gradient_sync(number == len(batches))
                each = passes(model, batch, features, config, workers.device)
                (each.mean() / len(batches)).backward()
                bucket = (batch.sigma * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
                of_sigma[0].index_add_(0, bucket, each.detach().double().cpu())
                of_sigma[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))

            squared, left_alone = optimizer.finish() if config.optim.fused else (optimizer.squared_norm(), 0)
            took, mark = time.monotonic() - mark, time.monotonic()
            new_bad = stream.new_bad()
            told = workers.sum([*of_sigma.flatten(), squared / copies, left_alone, stop.asked, len(new_bad), took])
            of_sigma = torch.tensor(told[: 2 * SIGMA_BUCKETS]).view(2, -1)
            squared, left_alone, asked, found, took = told[2 * SIGMA_BUCKETS :]
            loss, norm = (of_sigma[0].sum() / of_sigma[1].sum()).item(), math.sqrt(max(squared, 0.0))
            finite = math.isfinite(loss) and math.isfinite(squared) and not left_alone
            if not config.optim.fused:
                if finite:
                    optimizer.clip(norm, config.optim.clip)
                    optimizer.step()
                else:
                    optimizer.drop()
            skipped, skipped_in_row = (skipped, 0) if finite else (skipped + 1, skipped_in_row + 1)
            if skipped_in_row >= config.optim.max_skipped:
                raise UserError(
                    f"step {done + 1}: the loss or a gradient was not finite {skipped_in_row} steps in a row; the last "
                    f"checkpoint is step {max(saved, 0)}; lower optim.lr, or set optim.clip"
                )
            if finite:
                average.update(optimizer.steps)
            new_bad = stream.learn(workers.union(new_bad)) if found else []
            done += 1
            stop.agreed = asked > 0
            seconds += took / workers.world  # the same everywhere: the schedule may depend on it
            monitor.step(
                done, loss=loss, of_sigma=of_sigma, norm=norm, lr=optimizer.lr, epoch=stream.epoch,
                seconds=took / workers.world, skipped=skipped, bad=len(stream.bad), bad_names=new_bad,
            )  # fmt: skip
            if done % config.save_every == 0:
                save()
                saved = done
            if config.log.sample_every and config.log.prompts and done % config.log.sample_every == 0:
                sheet = sample_sheet(model, features, config, workers, lambda: stop.agree(workers))
                if sheet is not None:
                    with atomic_path(folder / "samples" / f"step-{done:08d}.png") as temporary:
                        sheet.save(temporary)
                    monitor.show(done, sheet)
        if saved != done or not checkpoints.complete(folder):
            save()
    if stop.agreed:
        monitor.say(f"stopped by a signal; step {done} is saved, the same command goes on")
    elif workers.first:
        export(folder, average)
    return not stop.agreed


def passes(model, batch, features: Features, config: Config, device: torch.device) -> Tensor:
    """(B,) losses of one forward pass."""
    texts = [features[prompt].to(device) for prompt in batch.prompts]
    pixels, noise, sigma = (x.to(device, non_blocking=True) for x in (batch.pixels, batch.noise, batch.sigma))
    with autocast(config, device):
        return losses(model, pixels, noise, sigma, texts, batch.windows, config.objective.pyramid)


def schedule(config: Config, step: int, seconds: float) -> float:
    """The share of the learning rate at a step: warm-up, then constant, or falling to zero."""
    warm = min(1.0, (step + 1) / config.optim.warmup) if config.optim.warmup else 1.0
    progress = min(1.0, max(step / config.steps, seconds / (60 * config.minutes) if config.minutes else 0.0))
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return warm * falling[config.optim.schedule]


def tensors_of(optimizer: AdamW, average: EMA) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    parts = {
        checkpoints.MODEL: {name: p.detach() for name, p in optimizer.named.items()},
        checkpoints.OPTIM: optimizer.tensors(),
        checkpoints.EMA: average.tensors(),
    }
    return {prefix + name: value for prefix, tensors in parts.items() for name, value in tensors.items()}


class Stop:
    """A wish to stop, by SIGTERM (preemption) or SIGINT; `agreed` once all processes know of it. Use as a context."""

    def __init__(self):
        self.asked, self.agreed = False, False

    def __enter__(self) -> Stop:
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


def open_run(config: Config) -> Path:
    """The run's folder, made if need be."""
    if not config.run:
        raise UserError("no folder for the run; give --run FOLDER")
    folder = Path(config.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}; choose a writable folder for the run") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"can't write {folder}; choose a writable folder for the run")
    return folder


def open_data(config: Config, workers: Workers) -> tuple[list[Picture], Features]:
    """The pictures and their text features, made where they are missing (each process its part)."""
    pictures = workers.share(list_pictures(config.data) if workers.first else None)
    features = Features(config.data.features or Path(config.run) / "features")
    empty = [""] if config.data.caption_dropout or config.log.sample_every else []
    missing = features.missing([*empty, *(p.prompt for p in pictures), *config.log.prompts])
    workers.wait()
    if missing:
        mine = missing[workers.rank :: workers.world]
        if mine or not config.data.text_encoder:
            make_features(features, mine or missing, config.data.text_encoder, workers.device)
        workers.wait()
        features.refresh()
        free_memory(workers.device)
    return pictures, features


def open_stream(config: Config, pictures: list[Picture], model: L2PTransformer2DModel, workers: Workers) -> Stream:
    """The stream of batches for ``model``."""
    buckets, bad = None, set()
    if workers.first:
        step = model.size_multiple // model.patch_size
        buckets = make_buckets(pictures, config.data, step, bad, config.data.workers)
    buckets, bad = workers.share((buckets, bad))
    return Stream(
        pictures, buckets, config.data, config.objective, model.patch_size, config.seed, workers.rank, workers.world,
        config.accumulation, bad,
    )  # fmt: skip


def check_sheet(config: Config, model: L2PTransformer2DModel) -> None:
    """Refuse a size of the sample sheets that the model can't draw, before the first is due."""
    log, multiple = config.log, model.size_multiple
    if log.sample_every and (log.height % multiple or log.width % multiple):
        raise UserError(f"log.height and log.width must be multiples of {multiple}, got {log.height} x {log.width}")


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: ``auto`` the last of the run, ``none``, or a path.

    Raises:
        UserError: the run has later checkpoints than that.
    """
    found = checkpoints.complete(folder)
    if resume == "auto":
        return found[-1] if found else None
    place = None if resume == "none" else Path(resume)
    if found and (place is None or found[-1].name > place.name):
        raise UserError(f"{folder} holds a later checkpoint ({found[-1].name}); give another --run, or remove it")
    return place


def check_same(config: Config, other: dict, place: Path) -> None:
    """Refuse a checkpoint whose tensors mean something else under this configuration."""
    ours = as_dict(config)
    for key in FIXED:
        here, there = ours, other
        for part in key.split("."):
            here, there = here[part], there.get(part)
        if here != there:
            raise UserError(
                f"the checkpoint {place} was made with {key} = {there!r}, now it is {here!r}; use that, "
                "or another run folder"
            )


def export(folder: Path, average: EMA) -> None:
    """Write the trained tensors alone (`l2p_fast.convert merge` puts them over the base), averaged ones beside them."""
    from .formats.write import write_pieces

    last = checkpoints.complete(folder)[-1]
    for name, averaged in (("trained", False), ("trained-ema", True)):
        if not averaged or average.average:
            held = checkpoints.TrainedTensors(last, averaged)
            write_pieces({key: held.piece(key) for key in held.shapes}, folder / f"{name}.safetensors")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m l2p_fast.train", description=__doc__)
    p.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="the run's settings; see configs/")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="over the file's, as in optim.lr=1e-4")
    p.add_argument("--run", metavar="FOLDER", help="where everything is written, and where a stopped run goes on")
    p.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="checkpoint to go on from (default auto)")
    p.add_argument("--fsdp", action="store_true", help="share the model among the processes of torchrun")
    p.add_argument("--hybrid", action="store_true", help="with --fsdp: share within a node, copy across nodes")
    p.add_argument("--dry-run", action="store_true", help="print the plan and the memory it takes; train nothing")
    p.add_argument("--device-gb", type=float, metavar="GB", help="with --dry-run: judge for a device of this memory")
    p.add_argument("--processes", type=int, default=1, help="with --dry-run --fsdp: how many share the model")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    path, overrides = args.config, args.overrides
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    config = load_config(path, overrides)
    config.run = args.run or config.run
    config.parallel.fsdp |= args.fsdp
    config.parallel.hybrid |= args.hybrid
    check(config)
    if args.processes < 1:
        raise UserError(f"--processes must be at least 1, got {args.processes}")
    if args.dry_run:
        print(plan(config, args.processes, args.device_gb))
        return 0
    workers = start(config)
    try:
        train(config, workers, args.resume)
    finally:
        workers.close()
    return 0


if __name__ == "__main__":
    run_cli(main)
