"""The options of drawing a set of images."""

from __future__ import annotations

import argparse

ENGINES = ("processes", "ray")  # that share the work


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """What is drawn, by what, how much of it at once, and what is kept."""
    add = parser.add_argument
    add("prompts", help="a .jsonl, a .txt with a prompt a line, or starter: the set that ships")
    add("--out", required=True, metavar="FOLDER", help="an interrupted run goes on there")
    add("--model", help="file, folder or pipeline folder of an L2P model (default: a bundled one)")
    add("--text-encoder", help="folder or hub id with text_encoder/ and tokenizer/")
    add("--pipeline", help="instead: folder or hub id of any diffusers text-to-image pipeline")
    add("--each", type=int, default=2, help="images of a prompt, with seeds counting up (default: 2)")
    add("--seed", type=int, default=0, help="of the first image (default: 0)")
    for name in ("res", "height", "width"):
        add(f"--{name}", type=int, help="in pixels (default: the model's own)")
    add("--steps", type=int, help="denoising steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--negative", default="", help="prompt to steer away from")
    add("--limit", type=int, metavar="N", help="the first N prompts")
    add("--format", default="png", help="png (default), jpg or webp")
    for name, words in (("device", "auto"), ("dtype", "auto"), ("quantize", "none"), ("offload", "none")):
        add(f"--{name}", default=words, help=f"as for l2p sample (default: {words})")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="a LoRA over the model; may be given several times")
    add("--engine", default="processes", help="what shares the work: processes (torchrun's; default) or ray")
    add("--workers", type=int, metavar="N", help="of Ray (default: one for each GPU, or one)")
    add("--gate", metavar="FOLDER", help="leave out images that a CLIP model finds far from their prompt")
    add("--gate-least", type=float, metavar="SCORE", help="cosine that an image must have")
    add("--shards", type=int, metavar="N", help="write WebDataset shards of N images, too, once all are drawn")
    add("--no-progress", action="store_true", help="no progress bar")
