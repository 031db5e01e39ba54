"""Measure the small world's models on its fixed prompts: a table by task, the retention, and contact sheets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from l2p_fast.files import atomic_path
from l2p_fast.sampling.facts import find_model
from l2p_fast.sampling.pipeline import L2PPipeline, load_pipeline

from .corpus import load_source, sample_source
from .ldm import SIDE
from .scorer import matches, read
from .world import TASKS, Prompt, draw, draw_scene, evaluation_prompts

BATCH = 24
SHEET_PROMPTS = (
    "a red star above two blue circles", "a blue circle", "three green triangles", "a yellow ring",
    "a black square left of a red ring", "two purple stars", "a green circle and a black triangle",
    "four yellow circles", "a purple square", "a yellow star right of a blue square", "two red squares",
    "a blue ring below a green star", "a black star", "three red circles", "a purple triangle above a yellow square",
    "a green ring and a red triangle",
)  # fmt: skip
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


def from_pipeline(pipeline: L2PPipeline, side: int) -> Draw:
    """A `Draw` that samples ``side`` px square with the pipeline's own defaults."""
    pipeline.set_progress_bar_config(disable=True)

    def pictures(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompts, height=side, width=side, generator=generators).images

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


def bundled_sheet(out: Path, device: torch.device, side: int) -> None:
    """Draw `SHEET_PROMPTS` with the bundled model for ``side`` px and its defaults, seeds 1 to 16."""
    pipeline = load_pipeline(find_model(None, side).path).to(device)
    pictures = from_pipeline(pipeline, side)
    with tqdm(SHEET_PROMPTS, desc="sheet", disable=not sys.stderr.isatty()) as prompts:
        images = [pictures([text], [seed])[0] for seed, text in enumerate(prompts, start=1)]
    with atomic_path(out) as temporary:
        contact_sheet(images, 8, side=160).save(temporary)


def run(folder: Path, device: torch.device, per_task: int, sides: dict[int, list[int]]) -> dict:
    """Score renderer, source and the L2P models at ``sides`` {patch: [px, ...]}.

    Writes ``score.json``, ``score.md`` and contact sheets. What ``score.json`` has already of as many prompts is kept:
    remove it after training on.

    "retention" is overall / source's overall, as the paper reports it.
    """
    prompts = evaluation_prompts(per_task)
    rng = np.random.default_rng(7)

    def renderer(texts: list[str], seeds: list[int]) -> list[Image.Image]:
        scenes = [draw_scene(rng, Prompt.parse(text)) for text in texts]
        arrays = [np.moveaxis(draw(scene, SIDE, SIDE), 0, 2) for scene in scenes]
        return [Image.fromarray(((a + 1) * 127.5).round().astype(np.uint8)) for a in arrays]

    source = load_source(folder, device)
    draws: dict[str, tuple[Draw, int]] = {
        f"renderer {SIDE} px": (renderer, BATCH),
        f"source (latent) {SIDE} px": (lambda texts, seeds: sample_source(source, texts, seeds), BATCH),
    }
    for patch, pixels in sides.items():
        if (folder / f"l2p-{patch}").exists():
            pipeline = L2PPipeline.from_pretrained(folder / f"l2p-{patch}", torch_dtype=torch.bfloat16).to(device)
            for side in pixels:
                batch = max(1, BATCH * (8 * patch) ** 2 // side**2)
                draws[f"L2P patch {patch}, {side} px"] = from_pipeline(pipeline, side), batch
    path = folder / "score.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for name, (pictures, batch) in draws.items():
        if table.get(name, {}).get("prompts") != len(prompts):
            table[name], images = measure(name, prompts, pictures, batch)
            sheet = contact_sheet(images[:: max(1, len(images) // 48)][:48], 8)
            with atomic_path(folder / "sheets" / (name.replace(",", "").replace(" ", "-") + ".png")) as temporary:
                sheet.save(temporary)
        reference = table.get(f"source (latent) {SIDE} px")
        if reference and name.startswith("L2P"):
            table[name]["retention"] = round(table[name]["overall"] / max(reference["overall"], 1e-9), 3)
        print(name, table[name], flush=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(table, indent=1) + "\n")
    columns = [*TASKS, "overall", "retention"]
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for name, row in table.items()]
    with atomic_path(folder / "score.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return table
