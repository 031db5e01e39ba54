"""The paper's ablations in small: short transfers that differ in one setting, scored on the fixed prompts.

Each run is `transfer.settings` with something replaced, trained for the same number of steps from the same start, and
sampled on the source's own grid. Short runs score low, so the error of the predicted picture is measured, too, on
pictures of the renderer that no run has seen. A run that is done is kept, one that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.models.text import encode_prompts
from l2p_fast.sampling import flow
from l2p_fast.sampling.pipeline import L2PPipeline
from l2p_fast.training import loop
from l2p_fast.training.config import Config, DataConfig, FreezeConfig
from l2p_fast.training.data import list_images
from l2p_fast.training.parallel import start

from .corpus import draw_corpus, write_table
from .fit import fast_dtype
from .ldm import random_pictures
from .score import BATCH, from_pipeline, measure
from .scorer import matches, read
from .transfer import FREE_BLOCKS, GRID, SHIFTS, prepare, save_pipeline, settings
from .world import Prompt, draw, evaluation_prompts

FEW, VERY_FEW = 120, 30  # pictures where their number or origin is compared
LARGEST_BATCH = 16
UNSEEN, UNSEEN_BATCH, UNSEEN_LEVELS = 48, 8, (0.25, 0.5, 0.75)  # pictures, and noise levels before the shift
_EVERYTHING_ELSE = ["all_x_embedder.*", "noise_refiner.*", "context_refiner.*", "t_embedder.*", "cap_embedder.*",
                    "x_pad_token", "cap_pad_token", "local_decoder.*"]  # fmt: skip


@dataclass
class Run:
    """A row of the table: what is asked, what is chosen, and how that changes the configuration."""

    question: str
    choice: str
    change: Callable[[Config], None]
    patch_size: int = 16

    @property
    def name(self) -> str:
        return f"{self.question}-{self.choice}".replace(" ", "-")


def plan(folder: Path, other: Path | None, n_layers: int) -> list[Run]:
    """All runs. ``other`` is a folder of another model's pictures in the published layout, or None: left out."""
    corpus, lists = folder / "corpus", folder / "ablations"

    def pictures(path: Path) -> Callable[[Config], None]:
        return lambda config: setattr(config.data, "path", str(path))

    def blocks(freeze: FreezeConfig) -> Callable[[Config], None]:
        return lambda config: setattr(config, "freeze", freeze)

    def shift(value: float) -> Callable[[Config], None]:
        def change(config: Config) -> None:
            config.objective.shift = value
            config.model.base = str(folder / "l2p-64" / "transformer")
            config.optim.lr /= 5  # the model is trained already

        return change

    middle = [f"layers.{i}.*" for i in range(FREE_BLOCKS, n_layers - FREE_BLOCKS)]
    runs = [
        Run("trained blocks", "shallow", lambda config: None),
        Run("trained blocks", "middle", blocks(FreezeConfig([*_EVERYTHING_ELSE, *middle]))),
        Run("trained blocks", "all", blocks(FreezeConfig("full"))),
        Run("optimizer", "8-bit", lambda config: setattr(config.optim, "kind", "adamw8bit")),
        Run("pictures", str(VERY_FEW), pictures(_first(corpus, VERY_FEW, lists / f"source-{VERY_FEW}.csv"))),
        Run("pictures", str(FEW), pictures(_first(corpus, FEW, lists / f"source-{FEW}.csv"))),
        Run("pictures by", "the renderer", pictures(folder / "renderer" / "ablation")),
    ]
    if other is not None:
        theirs, drawn = _first(other, FEW, lists / "other.csv", check=True), folder / "renderer" / "as-other"
        draw_corpus(drawn, 2 * GRID * 16, [Prompt.parse(prompt) for _, prompt, _ in _rows(theirs)])
        runs += [
            Run("equal prompts by", "the source", pictures(_of_prompts(corpus, theirs, lists / "source-as-other.csv"))),
            Run("equal prompts by", "the renderer", pictures(drawn)),
            Run("equal prompts by", "another model", pictures(theirs)),
        ]
    if (folder / "l2p-64").exists():
        runs += [Run("shift at patch 64", f"{value:g}", shift(value), 64) for value in (3.0, SHIFTS[16], SHIFTS[64])]
    return runs


def _rows(data: Path) -> list[tuple[str, str, int | None]]:
    """(absolute path, prompt, seed) of each picture of a folder or a table in the published layout."""
    pictures = list_images(DataConfig(path=str(data), layout="csv"))
    return [(str(Path(picture.file).resolve()), picture.prompt, picture.seed) for picture in pictures]


def _first(data: Path, count: int, table: Path, check: bool = False) -> Path:
    """A table of the first ``count`` pictures of the folder ``data``; with ``check``, of those that are right."""
    if table.exists():
        return table
    rows = _rows(data)
    if check:
        rows = [row for row in rows if (prompt := Prompt.parse(row[1])) and matches(prompt, read(Image.open(row[0])))]
    if len(rows) < count:
        raise UserError(f"{data} has {len(rows)} pictures that can be used, {count} are needed")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, rows[:count])
    return table


def _of_prompts(data: Path, like: Path, table: Path) -> Path:
    """A table of pictures of the folder ``data`` that show the prompts of the table ``like``, as far as there are."""
    if not table.exists():
        wanted, rows = Counter(prompt for _, prompt, _ in _rows(like)), []
        for row in _rows(data):
            if wanted[row[1]] > 0:
                wanted[row[1]] -= 1
                rows.append(row)
        write_table(table, rows)
    return table


def configure(folder: Path, run: Run, steps: int, device: torch.device) -> Config:
    """The configuration of a run: the transfer's, on the source's own grid alone."""
    config = settings(folder, run.patch_size, 0.0)
    config.run, config.steps, config.device = str(folder / "ablations" / run.name), steps, str(device)
    known = config.data.grids[0]
    config.data.grids = [replace(known, share=1.0, batch=min(known.batch, LARGEST_BATCH))]
    config.save_every, config.keep, config.ema.decay, config.optim.warmup = 100, 1, 0.99, steps // 5
    run.change(config)
    return config


def run(folder: Path, device: torch.device, steps: int, per_task: int, other: Path | None) -> None:
    """Train, score and draw; writes ``ablations.json``, ``ablations.md`` and ``ablations.png`` to ``folder``."""
    prepare(folder, 16, device)
    draw_corpus(folder / "renderer" / "ablation", 2 * GRID * 16, FEW)
    n_layers = json.loads((folder / "init-16" / "config.json").read_text())["n_layers"]
    prompts = evaluation_prompts(per_task)
    path = folder / "ablations.json"
    table: list[dict] = json.loads(path.read_text()) if path.exists() else []
    runs = plan(folder, other, n_layers)
    if other is None:
        print("pictures by another model are left out: give --other FOLDER")
    for one in tqdm(runs, desc="ablations", disable=not sys.stderr.isatty()):
        setting = {"steps": steps, "prompts": len(prompts)}
        if any(row["run"] == one.name and row.items() >= setting.items() for row in table):
            continue
        config, pipeline = configure(folder, one, steps, device), folder / "ablations" / f"{one.name}-pipeline"
        if not pipeline.exists():
            workers = start(config)
            try:
                if not loop.train(config, workers):
                    return
            finally:
                workers.close()
            save_pipeline(folder, config, pipeline)
        model = L2PPipeline.from_pretrained(pipeline, dtype=fast_dtype(device)).to(device)
        sample = from_pipeline(model, GRID * one.patch_size)
        scores, _ = measure(one.name, prompts, sample, BATCH if one.patch_size == 16 else 2)
        error, deviation = picture_error(model, one.patch_size)
        row = {"run": one.name, "question": one.question, "choice": one.choice, **setting, **scores}
        row |= {"picture_error": error, "picture_error_se": deviation}
        table = [*(old for old in table if old["run"] != one.name), row]
        print(one.name, scores, flush=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1) + "\n")
    report(table, folder)


@torch.no_grad()
def picture_error(pipeline: L2PPipeline, patch_size: int) -> tuple[float, float]:
    """Mean squared error of x0 as predicted from noisy unseen pictures of the renderer, and its standard error.

    The noise levels are those of `UNSEEN_LEVELS` under the shift of the patch size: the same for all of its runs.
    """
    side, rng, drawn = GRID * patch_size, torch.Generator().manual_seed(0), random_pictures(5)
    shift, errors = SHIFTS[patch_size], []
    for _ in range(0, UNSEEN, UNSEEN_BATCH):
        made = [next(drawn) for _ in range(UNSEEN_BATCH)]
        x0 = torch.stack([torch.from_numpy(draw(scene, side, side)) for _, scene, _ in made]).to(pipeline.device)
        texts = encode_prompts(pipeline.text_encoder, pipeline.tokenizer, [prompt.text for prompt, *_ in made])
        noise = torch.randn(x0.shape, generator=rng).to(x0.device)
        found = []
        for level in UNSEEN_LEVELS:
            sigma = torch.full((UNSEEN_BATCH,), shift * level / (1 + (shift - 1) * level), device=x0.device)
            raw = pipeline.transformer(flow.add_noise(x0, noise, sigma), 1 - sigma, texts).float()
            found.append(((raw - flow.target(x0, noise)) * sigma[0]).square().mean(dim=(1, 2, 3)))
        errors.append(torch.stack(found).mean(dim=0))
    each = torch.cat(errors)
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item()


def report(table: list[dict], folder: Path) -> None:
    """The table and a plot of it, one panel for each question; the bars on the bars are standard errors."""
    from matplotlib.figure import Figure

    base = next(row for row in table if row["choice"] == "shallow")
    as_base = {"optimizer": "32-bit", "pictures": "all of the source's"}
    few = next(row for row in table if row["choice"] == str(FEW))
    panels: dict[str, list[tuple[str, dict]]] = {}
    for row in table:
        panels.setdefault(row["question"], []).append((row["choice"], row))
    for question, choice in as_base.items():
        panels[question].append((choice, base))
    panels["pictures by"].insert(0, ("the source", few))
    figure = Figure(figsize=(3 * len(panels), 5.5), layout="constrained")
    above, below = figure.subplots(2, len(panels), sharey="row")
    lines = ["| question | choice | score | error of the picture |", "|---|---|---|---|"]
    for (question, rows), *axes in zip(panels.items(), above, below, strict=True):
        choices = [choice for choice, _ in rows]
        scores = [
            (row["overall"], math.sqrt(row["overall"] * (1 - row["overall"]) / row["prompts"])) for _, row in rows
        ]
        errors = [(row["picture_error"], row["picture_error_se"]) for _, row in rows]
        for axis, values in zip(axes, (scores, errors), strict=True):
            axis.bar(choices, [value for value, _ in values], yerr=[error for _, error in values], capsize=3)
            axis.tick_params(axis="x", rotation=20, labelsize=8)
        axes[0].set_title(question, fontsize=10)
        lines += [
            f"| {question} | {choice} | {score[0]:.3f} ± {score[1]:.3f} | {error[0]:.4f} ± {error[1]:.4f} |"
            for choice, score, error in zip(choices, scores, errors, strict=True)
        ]
    above[0].set_ylabel("score")
    below[0].set_ylabel("error of the picture")
    with atomic_path(folder / "ablations.png") as temporary:
        figure.savefig(temporary, dpi=100)
    with atomic_path(folder / "ablations.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
