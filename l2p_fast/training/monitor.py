"""What a run shows: a JSON line a step, TensorBoard or W&B, a progress bar. The first process alone."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import secrets
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_path
from .config import Config, as_dict
from .objective import SIGMA_BUCKETS
from .parallel import Workers

LOG = "log.jsonl"
NUMBERS = ("loss", "grad_norm", "seconds", "images_per_second")  # of each line
BOARD_PIXELS = 4096  # longer side of a sheet on TensorBoard or W&B


def read_log(folder: str | Path, until: int | None = None) -> list[dict]:
    """The lines of a run's log up to a step; a damaged one, such as a killed run half wrote, is left out."""
    lines = []
    path = Path(folder) / LOG
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_whole(line) and (until is None or line["step"] <= until):
            lines.append(line)
    return lines


def _is_whole(line: object) -> bool:
    """Whether ``line`` has what is read of it: numbers, and the losses by noise level."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    levels = line.get("loss_by_sigma")
    values = [line.get(key) for key in NUMBERS] + list(levels.values() if isinstance(levels, dict) else [None])
    return all(type(value) in (int, float) for value in values)


class Monitor:
    """Use as a context around the loop. Lines of steps after ``done``, from a run that was killed, are dropped.

    Raises:
        UserError: W&B was asked for, and is not installed or can't be reached.
    """

    def __init__(self, folder: Path, config: Config, done: int, workers: Workers):
        self.first, self.device, self.folder = workers.first, workers.device, folder
        self.log = self.board = self.bar = None
        self.smooth = math.nan
        if not self.first:
            return
        kept = read_log(folder, done)
        with atomic_path(folder / LOG) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.log = open(folder / LOG, "a")
        if config.log.board == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(folder / "tensorboard", purge_step=done + 1)
            except ImportError:
                self.say(f"TensorBoard is not installed (pip install tensorboard): curves are in {folder / LOG} alone")
        elif config.log.board == "wandb":
            try:
                import wandb
            except ImportError as error:
                raise UserError("log.board=wandb needs wandb: pip install wandb, or log.board=tensorboard") from error
            identity = folder / "wandb-id.txt"  # a resumed run goes on in the same curves
            if not identity.exists():
                with atomic_path(identity) as temporary:
                    temporary.write_text(secrets.token_hex(8))
            try:
                self.board = wandb.init(
                    dir=folder, project="l2p_fast", name=folder.name, id=identity.read_text(), resume="allow",
                    config=as_dict(config),
                )  # fmt: skip
            except wandb.Error as error:
                raise UserError(f"W&B: {error} Or set WANDB_MODE=offline, or log.board=tensorboard") from error
        self.bar = tqdm(total=config.steps, initial=done, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        for part in (self.bar, self.log, self.board):
            if part is not None:
                with contextlib.suppress(OSError):  # a full disk, which `step` has reported
                    (part.finish if hasattr(part, "finish") else part.close)()

    def say(self, text: str) -> None:
        if self.first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(
        self, step: int, *, loss: float, of_sigma: Tensor, norm: float, lr: float, epoch: float, seconds: float,
        skipped: int, bad: int, bad_names: list[str],
    ) -> None:  # fmt: skip
        """Tell of a step. ``of_sigma`` (2, buckets): sums of losses by noise level, and how many."""
        if not self.first:
            return
        if bad_names:
            tqdm.write(f"step {step}: can't read {', '.join(bad_names)}; skipped", file=sys.stderr)
        images = int(of_sigma[1].sum())
        by_sigma = {
            f"{i / SIGMA_BUCKETS:g}-{(i + 1) / SIGMA_BUCKETS:g}": (of_sigma[0, i] / of_sigma[1, i]).item()
            for i in range(SIGMA_BUCKETS)
            if of_sigma[1, i]
        }
        line = {
            "step": step, "loss": loss, "loss_by_sigma": by_sigma, "grad_norm": norm, "lr": lr, "images": images,
            "epoch": round(epoch, 4), "seconds": round(seconds, 4), "images_per_second": round(images / seconds, 3),
            "memory_gb": round(peak_bytes(self.device) / 1e9, 3), "skipped_steps": skipped, "bad_images": bad,
        }  # fmt: skip
        numbers = {k: v for k, v in line.items() if k not in ("step", "loss_by_sigma")}
        numbers |= {f"loss_by_sigma/{k}": v for k, v in by_sigma.items()}
        try:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
            if hasattr(self.board, "add_scalar"):
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, step)
            elif self.board is not None:
                self.board.log(numbers, step=step)
        except OSError as error:
            raise UserError(f"can't write {self.log.name}: {error.strerror or error}") from error
        if math.isfinite(loss):
            self.smooth = loss if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        self.bar.update(1)
        self.bar.set_postfix_str(
            f"{line['images_per_second']:.2f} images/s, loss {self.smooth:.4f}, {line['memory_gb']:.1f} GB"
        )

    def tell(self, step: int, name: str, value: float) -> None:
        """Put one more number on the board."""
        if hasattr(self.board, "add_scalar"):
            self.board.add_scalar(name, value, step)
        elif self.board is not None:
            self.board.log({name: value}, step=step)

    def show(self, step: int, sheet: Image.Image) -> None:
        """Keep a sample sheet, and put it on the board, made smaller: `sheet` itself is changed."""
        with atomic_path(self.folder / "samples" / f"step-{step:08d}.png") as temporary:
            sheet.save(temporary)
        sheet.thumbnail((BOARD_PIXELS, BOARD_PIXELS))
        if hasattr(self.board, "add_image"):
            self.board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
        elif self.board is not None:
            import wandb

            self.board.log({"samples": wandb.Image(sheet)}, step=step)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the CUDA allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> None:
    """Give back what was used before the training, and count the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
