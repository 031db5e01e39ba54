"""What fewer evaluations save and cost, on the bundled models: fewer steps, guidance at some of them, caches.

Each way of drawing is compared with the full run: the same prompts and seeds, a model's own defaults. A row holds the
evaluations and seconds (the median) of an image, how many times faster that is, how far its pixels are from the full
run's (mean absolute difference, of 255), and the share of the prompts that the scorer reads in the images.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from PIL import Image

from l2p_fast.files import atomic_path
from l2p_fast.sampling.facts import find_model
from l2p_fast.sampling.pipeline import L2PPipeline, load_pipeline

from .fit import fast_dtype
from .score import Draw, from_pipeline, markdown, measure
from .world import Prompt, evaluation_prompts

FULL = "full run"
# Name -> what differs from the model's defaults; "cache" is a configuration of diffusers.
WAYS: dict[str, dict] = {
    FULL: {},
    **{f"{steps} steps": {"num_inference_steps": steps} for steps in (12, 8, 4)},
    **{f"guidance in {low:g} to {high:g}": {"guidance_interval": (low, high)}
       for low, high in ((0.2, 0.8), (0.5, 1), (0.8, 1))},
    "no guidance": {"guidance_scale": 1.0},
    "8 steps, guidance in 0.5 to 1": {"num_inference_steps": 8, "guidance_interval": (0.5, 1)},
    **{f"first-block cache, {threshold:g}": {"cache": FirstBlockCacheConfig(threshold=threshold)}
       for threshold in (0.05, 0.1, 0.2)},
    "attention every second step": {
        "cache": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            current_timestep_callback=lambda: 500,  # within the range of timesteps where it skips: at all of them
        )
    },
    "attention by Taylor series every second step": {
        "cache": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=3, max_order=1)
    },
}  # fmt: skip
COLUMNS = ("evaluations", "seconds", "speed-up", "difference", "score")


def run(folder: Path, device: torch.device, per_task: int, sides: dict[str, list[int]]) -> dict:
    """Draw and compare every way of `WAYS` by each model of ``sides`` {name: [px, ...]}.

    Writes ``fewer.json`` and ``fewer.md``. Rows that ``fewer.json`` has already of as many prompts, and the full run's
    images, are kept: remove both to measure anew.
    """
    prompts = evaluation_prompts(per_task)
    path = folder / "fewer.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for model, side in ((model, side) for model, several in sides.items() for side in several):
        waiting = [way for way in WAYS if table.get(f"{model}, {side} px: {way}", {}).get("prompts") != len(prompts)]
        if not waiting:
            continue
        pipe = load_pipeline(find_model(model).path, torch_dtype=fast_dtype(device), device=device)
        from_pipeline(pipe, side)([prompts[0].text], [0])  # what is made once
        kept = [folder / "fewer" / f"{model}-{side}" / f"{i:04}.png" for i in range(len(prompts))]
        if not all(file.exists() for file in kept) and FULL not in waiting:
            waiting.insert(0, FULL)
        for way in waiting:
            name = f"{model}, {side} px: {way}"
            table[name], images = drawn(pipe, side, name, prompts, WAYS[way])
            if way == FULL:
                for image, file in zip(images, kept, strict=True):
                    with atomic_path(file) as temporary:
                        image.save(temporary, "PNG")
            else:
                full = table[f"{model}, {side} px: {FULL}"]
                table[name]["speed-up"] = round(full["seconds"] / table[name]["seconds"], 2)
                table[name]["difference"] = difference(images, kept)
            print(name, table[name], flush=True)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(table, indent=1) + "\n")
    with atomic_path(folder / "fewer.md") as temporary:
        temporary.write_text(markdown(table, COLUMNS))
    return table


def drawn(pipe: L2PPipeline, side: int, name: str, prompts: list[Prompt], way: dict) -> tuple[dict, list[Image.Image]]:
    """A row without its comparison, and the images. One is drawn at a time: caches judge a batch as a whole."""
    how, rows, seconds = dict(way), [], []
    cache = how.pop("cache", None)
    pictures = timed(from_pipeline(pipe, side, **how), seconds)
    counting = pipe.transformer.head.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    if cache is not None:
        pipe.transformer.enable_cache(cache)
    try:
        scores, images = measure(name, prompts, pictures, batch=1)
    finally:
        counting.remove()
        if cache is not None:
            pipe.transformer.disable_cache()
    row = {"evaluations": round(sum(rows) / len(images), 2), "seconds": round(float(np.median(seconds)), 3)}
    return row | {"score": scores["overall"], "prompts": len(prompts)}, images


def timed(pictures: Draw, seconds: list[float]) -> Draw:
    """``pictures``, with the seconds of each call noted."""

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        start = time.perf_counter()
        images = pictures(prompts, seeds)
        seconds.append(time.perf_counter() - start)
        return images

    return draw


def difference(images: list[Image.Image], files: list[Path]) -> float:
    """Mean absolute difference of pixels, of 255."""

    def values(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB"), np.float32)

    each = []
    for image, file in zip(images, files, strict=True):
        with Image.open(file) as full:
            each.append(np.abs(values(image) - values(full)).mean())
    return round(float(np.mean(each)), 2)
