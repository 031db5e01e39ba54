"""The gate: images, not the loss, say which checkpoint is the best, and that one is kept.

Every ``gate.every`` steps the images of ``log.prompts`` are scored. A line of ``gate.jsonl`` tells of each time; the
best is the best-scored step whose checkpoint is still there, so it survives pruning, stops and kills.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..errors import UserError
from ..evaluation.gridmeter import measure_grid
from ..evaluation.imagesets import Cache, bytes_of, items_of_folder
from ..evaluation.metrics import frechet
from ..evaluation.scoring import load_judges, weights_name
from ..files import atomic_path
from . import state as checkpoints
from .config import Config
from .parallel import Workers

LOG = "gate.jsonl"


class Gate:
    """Scores images, and knows the best checkpoint; the first process alone does. All processes make one.

    Args:
        folder: of the run.
        period: of the patch grid in pixels.
        done: steps done; what was scored later, by a run that was killed, is dropped.

    Raises:
        UserError: weights or images that can't be used, on all processes.
    """

    def __init__(self, folder: Path, config: Config, period: int, done: int, workers: Workers):
        self.folder, self.every, self.prompts = folder, config.gate.every, config.log.prompts
        self.by, self.highest = config.gate.by, config.gate.by == "clip"
        self.first, self.lines = workers.first, []
        failure = None
        if self.every and self.first:
            try:
                self._score = self._scorer(config, period, workers.device)
                # Scores of another kind, or by other weights, say nothing beside these.
                weights = weights_name(self.by, config.gate.weights) if self.by != "grid" else "grid"
                self.kind = {"by": self.by, "weights": weights, "prompts": list(self.prompts)}
                self.lines = [line for line in read_gate(folder) if line["step"] <= done]
                self._write()
            except UserError as error:
                failure = str(error)
        if failure := workers.share(failure) if self.every else None:
            raise UserError(failure)

    def due(self, step: int) -> bool:
        """Whether ``step`` is scored: it has a checkpoint then."""
        return self.every > 0 and step % self.every == 0

    @property
    def best(self) -> Path | None:
        """The best checkpoint; None where there is none, or on another process than the first."""
        held = [line for line in self.lines if self._comparable(line) and self._place(line).is_dir()]
        if not held:
            return None
        return self._place((max if self.highest else min)(held, key=lambda line: line["score"]))

    def judge(self, step: int, images: Sequence[Image.Image], say: Callable[[str], None]) -> float | None:
        """Score the images of ``step`` and note it; None: they have no score, or this is not the first process."""
        if not self.first:
            return None
        score = self._score(images)
        if score is None:
            say(f"gate, step {step}: no smooth area in the images, so their grid can't be measured")
            return None
        before = self.best
        self.lines.append({"step": step, "score": score} | self.kind)
        self._write()
        place = self._place(self.lines[-1])
        news = "the best so far" if self.best == place else f"the best stays {before.name if before else 'unknown'}"
        say(f"gate, step {step}: {self.by} {score:.4f}, {news}")
        return score

    def _comparable(self, line: dict) -> bool:
        return all(line.get(name) == value for name, value in self.kind.items())

    def _place(self, line: dict) -> Path:
        return checkpoints.place_of(self.folder, line["step"])

    def _write(self) -> None:
        with atomic_path(self.folder / LOG) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def _scorer(
        self, config: Config, period: int, device: torch.device
    ) -> Callable[[Sequence[Image.Image]], float | None]:
        gate = config.gate
        if self.by == "grid":
            return lambda images: grid_score(images, period)
        if self.by == "clip":
            judge = load_judges({"clip": gate.weights}, device=str(device)).clip
            texts = judge.texts(self.prompts)
            return lambda images: clip_score(torch.stack([judge.image(image) for image in images]), texts)
        judge = load_judges({"inception": gate.weights}, device=str(device)).inception

        @torch.inference_mode()
        def features(image: Image.Image) -> torch.Tensor:
            return judge(bytes_of(image)[None].to(device))[0].cpu()

        cache = Cache(self.folder / "gate-features")
        name = weights_name("inception", gate.weights)
        reference = cache.features(name, items_of_folder(gate.reference), lambda item, _: features(item.load()))
        return lambda images: frechet(torch.stack([features(image) for image in images]), reference)


def grid_score(images: Sequence[Image.Image], period: int) -> float | None:
    """How far smooth areas are from showing no grid: 1 is none. None: an image without smooth areas, such as noise."""
    ratios = [measure_grid(bytes_of(image), period).smooth for image in images]
    if None in ratios or 0 in ratios:
        return None
    return math.exp(math.fsum(abs(math.log(ratio)) for ratio in ratios) / len(ratios))


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> float:
    """100 times the mean cosine of features (N, C) of length 1."""
    return 100 * (images * texts).sum(dim=1).mean().item()


def read_gate(folder: str | Path) -> list[dict]:
    """The lines of a run's gate; a damaged one is left out."""
    path, lines = Path(folder) / LOG, []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and type(line.get("score")) in (int, float):
            lines.append(line)
    return [line for line in lines if 0 <= line["step"] <= checkpoints.MAX_STEP and math.isfinite(line["score"])]
