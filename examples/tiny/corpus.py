"""The training pictures: the source model draws them itself, as in the paper; those of finer grids the renderer.

A folder has the published layout: pictures beside a ``metadata.csv`` with the columns image, prompt, seed. The table
names only the pictures that the scorer reads as their prompt: a small source is often wrong, and its errors need not
be handed on.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image
from tqdm import tqdm

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.ops import to_uint8

from .autoencoder import PatchAutoencoder
from .fit import fast_dtype
from .ldm import BATCH, SIDE, random_pictures
from .scorer import matches, read
from .world import Prompt, draw, draw_scene

STEPS, GUIDANCE = 16, 2.0


def load_source(folder: Path, device: torch.device) -> ZImagePipeline:
    """The trained source model of ``folder``, in the `fast_dtype` of ``device``.

    Raises:
        UserError: it has not been trained yet.
    """
    if not (folder / "source").exists():
        raise UserError(f"no source model in {folder}; train it first: python -m examples.tiny ldm --folder {folder}")
    pipeline = ZImagePipeline.from_pretrained(
        folder / "source", vae=PatchAutoencoder.from_pretrained(folder / "vae"), dtype=fast_dtype(device)
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_source(pipeline: ZImagePipeline, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """128-px images, one for each prompt and seed. diffusers counts guidance from 0, so its scale is ours less 1."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        list(prompts), height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE - 1,
        negative_prompt=[""] * len(prompts), generator=generators, max_sequence_length=64,
    ).images  # fmt: skip


def run(folder: Path, device: torch.device, count: int) -> None:
    """Draw ``count`` pictures into ``folder/corpus`` and list the right ones; what is there already is kept."""
    pipeline, corpus = load_source(folder, device), folder / "corpus"
    corpus.mkdir(exist_ok=True)
    drawn = random_pictures(3)
    prompts = [next(drawn)[0] for _ in range(count)]
    rows = [(f"{i:05d}.png", prompt.text, i) for i, prompt in enumerate(prompts)]
    missing = [row for row in rows if not (corpus / row[0]).exists()]
    with tqdm(total=count, initial=count - len(missing), desc="corpus", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            images = sample_source(pipeline, [row[1] for row in batch], [row[2] for row in batch])
            for (name, _, _), image in zip(batch, images, strict=True):
                with atomic_path(corpus / name) as temporary:
                    image.save(temporary)
            bar.update(len(batch))
    right = [
        row for row, prompt in zip(rows, prompts, strict=True) if matches(prompt, read(Image.open(corpus / row[0])))
    ]
    write_table(corpus / "metadata.csv", right)
    print(f"{len(right)} of {count} pictures show what they were asked for and are listed in {corpus / 'metadata.csv'}")


def draw_corpus(folder: Path, side: int, prompts: int | Sequence[Prompt]) -> None:
    """Pictures of ``side`` px by the renderer into ``folder``, of so many prompts or of these; never drawn twice."""
    if (folder / "metadata.csv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(prompts, int):
        pictures = [picture[:2] for picture in islice(random_pictures(4, side), prompts)]
    else:
        rng = np.random.default_rng((4, side))
        pictures = [(prompt, draw_scene(rng, prompt)) for prompt in prompts]
    rows = []
    for i, (prompt, scene) in enumerate(tqdm(pictures, desc=f"renderer {side} px", disable=not sys.stderr.isatty())):
        rows.append((f"{i:05d}.png", prompt.text, i))
        with atomic_path(folder / rows[-1][0]) as temporary:
            values = torch.from_numpy(draw(scene, side, side))
            Image.fromarray(to_uint8(values[None])[0].numpy()).save(temporary, compress_level=1)
    write_table(folder / "metadata.csv", rows)


def write_table(path: Path, rows: Sequence[tuple[str, str, int]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", "seed"), *rows])
