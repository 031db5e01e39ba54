"""Measure the small world's models on its fixed prompts: a table by task, the retention, and contact sheets."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from l2p_fast.files import atomic_path
from l2p_fast.sampling.facts import find_model
from l2p_fast.sampling.pipeline import L2PPipeline, load_pipeline

from . import looks
from .corpus import load_source, sample_source
from .fit import fast_dtype
from .ldm import SIDE
from .scorer import matches, read
from .world import TASKS, Prompt, draw, draw_scene, evaluation_prompts

BATCH = 24
SHEET_PROMPTS = (
    "a red star above two blue circles", "a blue circle", "three green triangles", "a yellow ring",
    "a black square left of a red ring", "two purple stars", "a green circle and a black triangle",
    "four yellow circles", "a yellow star right of a blue square", "a blue ring below a green star", "a black star",
    "a purple triangle above a yellow square",
)  # fmt: skip
# The looks are measured on these, with seeds 1, 2, ...: every shape, large and small.
LOOK_PROMPTS = ("a blue circle", "a purple square", "a red star above two blue circles", "three green triangles",
                "a yellow star right of a black ring")  # fmt: skip
LOOK_SIDES = (128, 512, 1024, 4096)
# What is measured at which side.
LOOKS = {128: ("grain",), 512: ("texture", "edges"), 1024: ("texture",), 4096: ("weave", "direction", "png")}
MEASURES = {"grain": looks.grain, "texture": looks.grain, "edges": looks.edge_error, "weave": looks.weave,
            "direction": looks.direction, "png": looks.png_megabytes}  # fmt: skip
Draw = Callable[[list[str], list[int]], list[Image.Image]]


def contact_sheet(images: Iterable[Image.Image], columns: int, side: int = 192, gap: int = 6) -> Image.Image:
    """Pictures in rows of ``columns``, each fitted into ``side`` px."""
    images = list(images)
    cell = side + gap
    sheet = Image.new("RGB", (columns * cell + gap, -(-len(images) // columns) * cell + gap), "white")
    for i, image in enumerate(images):
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(image, (gap + i % columns * cell, gap + i // columns * cell))
    return sheet


def from_pipeline(pipeline: L2PPipeline, side: int, **how: Any) -> Draw:
    """A `Draw` that samples ``side`` px square with the pipeline's own defaults, but for ``how``."""
    pipeline.set_progress_bar_config(disable=True)

    def pictures(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompts, height=side, width=side, generator=generators, **how).images

    return pictures


def measure(name: str, prompts: list[Prompt], pictures: Draw, batch: int = BATCH) -> tuple[dict, list[Image.Image]]:
    """Draw every prompt with seed 1000 + its number and read the pictures back: shares right by task and overall."""
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=name, disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(prompts), batch):
            part = [prompt.text for prompt in prompts[start : start + batch]]
            images += pictures(part, list(range(1000 + start, 1000 + start + len(part))))
            bar.update(len(part))
    right = [matches(prompt, read(image)) for prompt, image in zip(prompts, images, strict=True)]
    tasks = {t: [r for r, p in zip(right, prompts, strict=True) if p.task == t] for t in TASKS}
    scores = {task: round(float(np.mean(values)), 3) for task, values in tasks.items() if values}
    return scores | {"overall": round(float(np.mean(list(scores.values()))), 3), "prompts": len(prompts)}, images


def bundled_sheet(out: Path, device: torch.device, side: int, large: int, cell: int = 200) -> None:
    """`SHEET_PROMPTS` at ``side`` px, made smaller, and a part of the first at ``large`` px as it is; seeds 1 to 12.

    Each is drawn by the bundled model for its size, with the model's own defaults.
    """

    def drawn(side: int, prompts: Sequence[str]) -> Iterator[Image.Image]:
        model = find_model(None, side).path
        pictures = from_pipeline(load_pipeline(model, torch_dtype=fast_dtype(device), device=device), side)
        for seed, text in enumerate(prompts, start=1):
            yield pictures([text], [seed])[0]

    with tqdm(
        drawn(side, SHEET_PROMPTS), total=len(SHEET_PROMPTS), desc="sheet", disable=not sys.stderr.isatty()
    ) as bar:
        sheet = contact_sheet(bar, 4, side=cell)
    whole = next(drawn(large, SHEET_PROMPTS[:1]))
    thing = max(read(whole), key=lambda thing: thing.size, default=None)
    x, y = (thing.x, thing.y - thing.size / 2) if thing else (0.5, 0.5)
    left, top = (min(max(0, round(c * large - sheet.height / 2)), large - sheet.height) for c in (x, y))
    both = Image.new("RGB", (sheet.width + sheet.height, sheet.height), "white")
    both.paste(sheet, (0, 0))
    both.paste(whole.crop((left, top, left + sheet.height, top + sheet.height)), (sheet.width, 0))
    with atomic_path(out) as temporary:
        both.save(temporary)


def measure_looks(drawer: Callable[[int], Draw], sides: Iterable[int], known: dict) -> dict:
    """What `LOOKS` names at each of ``sides``: brightnesses of 255, edges in px, PNG in MB.

    Each is a mean over `LOOK_PROMPTS`, of large images over the first two.

    Args:
        drawer: side in pixels -> `Draw`.
        known: the renderer's row; textures are told as multiples of its own. Empty: this is the renderer's.
    """
    row = {}
    for side in sides:
        pictures = drawer(side)
        prompts = LOOK_PROMPTS[:2] if side > 1024 else LOOK_PROMPTS
        images = [pictures([text], [seed])[0] for seed, text in enumerate(prompts, start=1)]
        for what in LOOKS[side]:
            name = f"{what} {side}"
            value = looks.mean(map(MEASURES[what], images))
            row[name] = round(value / known[name] if what == "texture" and known else value, 2)
    return row


def run(folder: Path, device: torch.device, per_task: int, sides: dict[int, list[int]], largest: int = 4096) -> dict:
    """Score renderer, source and pixel models at ``sides`` {patch: [px, ...]}, and how clean their images look.

    Pixel models are the folders `bundle` and `transfer` leave. Writes ``score.json``, ``score.md`` and contact sheets.
    What ``score.json`` has already of as many prompts is kept: remove it after training on.

    "retention" is overall / source's overall, as the paper reports it. ``largest`` px are the largest images.
    """
    prompts = evaluation_prompts(per_task)
    rng = np.random.default_rng(7)

    def renderer(side: int) -> Draw:
        def pictures(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            arrays = (draw(draw_scene(rng, Prompt.parse(text)), side, side) for text in texts)
            return [Image.fromarray(((np.moveaxis(a, 0, 2) + 1) * 127.5).round().astype(np.uint8)) for a in arrays]

        return pictures

    source = load_source(folder, device)
    # name -> (images of a side, sides of the looks, sides that are scored)
    models: dict[str, tuple[Callable[[int], Draw], tuple[int, ...], list[int]]] = {
        "renderer": (renderer, LOOK_SIDES, [SIDE]),
        "source (latent)": (lambda _: lambda texts, seeds: sample_source(source, texts, seeds), (SIDE,), [SIDE]),
    }
    for name, patch in (("tiny-1k", 16), ("tiny-4k", 64), ("l2p-16", 16), ("l2p-64", 64)):
        if (folder / name).exists():
            pipeline = L2PPipeline.from_pretrained(folder / name, dtype=fast_dtype(device)).to(device)
            look = LOOK_SIDES[:3] if patch == 16 else LOOK_SIDES[1:]
            models[name] = functools.partial(from_pipeline, pipeline), look, sides[patch]
    path = folder / "score.json"
    table = json.loads(path.read_text()) if path.exists() else {}

    def save() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1) + "\n")

    for model, (drawer, look, pixels) in models.items():
        for side in pixels:
            name = f"{model}, {side} px"
            if table.get(name, {}).get("prompts") != len(prompts):
                batch = max(1, BATCH * 512**2 // max(512, side) ** 2)
                table[name], images = measure(name, prompts, drawer(side), batch)
                sheet = contact_sheet(images[:: max(1, len(images) // 48)][:48], 8)
                with atomic_path(folder / "sheets" / (re.sub(r"[^a-z0-9]+", "-", name) + ".png")) as temporary:
                    sheet.save(temporary)
            reference = table.get(f"source (latent), {SIDE} px")
            if reference and model not in ("renderer", "source (latent)"):
                table[name]["retention"] = round(table[name]["overall"] / max(reference["overall"], 1e-9), 3)
            print(name, table[name], flush=True)
            save()
        if f"{model}: looks" not in table:
            known = table.get("renderer: looks", {})
            table[f"{model}: looks"] = measure_looks(drawer, [s for s in look if s <= largest], known)
            print(model, table[f"{model}: looks"], flush=True)
            save()
    text = markdown({n: row for n, row in table.items() if "overall" in row}, [*TASKS, "overall", "retention"])
    columns = [f"{what} {side}" for side, names in LOOKS.items() for what in names]
    text += "\n" + markdown({n.split(":")[0]: row for n, row in table.items() if "overall" not in row}, columns)
    with atomic_path(folder / "score.md") as temporary:
        temporary.write_text(text)
    return table


def markdown(table: dict[str, dict], columns: Sequence[str]) -> str:
    """A table with a row a model, or whatever else is compared."""
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for name, row in table.items()]
    return "\n".join(lines) + "\n"
