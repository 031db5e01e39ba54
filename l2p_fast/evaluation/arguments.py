"""The options of `l2p_fast.evaluate`, and what can be wrong with them. No torch here."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import FieldError, Parser, UserError
from .suites import EACH


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="l2p evaluate", description="Draw and score images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in EACH:
        sub = commands.add_parser(name, help=f"draw and score {name if name != 'prompts' else 'a file of prompts'}")
        sub.add_argument("prompts", help="the benchmark's prompts: its file, or for dpg its folder")
        sub.add_argument("--num-images", type=int, help=f"of each prompt (default: {EACH[name]})")
        sub.add_argument("--scores", help="what the benchmark's own scorer wrote")
        sub.add_argument("--shard", default="1/1", help="N/M: draw the N-th of M parts, on one of M machines")
        if name == "pixverve":
            sub.add_argument("--caption", default="long", help="which caption is drawn: long (default) or short")
        add_drawing(sub)
        add_scoring(sub, out_required=True)
    sub = commands.add_parser("folder", help="score the images in a folder")
    sub.add_argument("folder")
    add_scoring(sub)
    sub = commands.add_parser("compare", help="score two folders, and their difference")
    sub.add_argument("first")
    sub.add_argument("second")
    add_scoring(sub)
    sub = commands.add_parser("grid", help="does the patch grid show? by sampler, guidance and remedy")
    sub.add_argument("--prompts-file", help="one prompt a line (default: four for the bundled models)")
    sub.add_argument("--num-images", type=int, help="of each prompt (default: 1)")
    sub.add_argument("--samplers", default="euler", help="euler, stochastic, heun, unipc; several with commas")
    sub.add_argument("--guidances", help="guidance scales, with commas (default: the model's)")
    sub.add_argument("--ways", default="none,roll,pad", help="how the grid moves: none, roll, pad (default: all three)")
    add_drawing(sub, guidance=False)
    add_scoring(sub, out_required=True)
    return parser


def add_drawing(parser: argparse.ArgumentParser, guidance: bool = True) -> None:
    """Options of drawing, which mean what they mean to `l2p sample`."""
    add = parser.add_argument
    texts = ("model", "text-encoder", "negative", "guidance-interval", "dtype", "attention", "quantize", "offload")
    for name in (*texts, "cfg-batch"):
        add(f"--{name}", help="as of l2p sample")
    for name in ("res", "height", "width", "steps", "seed", "coarse-size"):
        add(f"--{name}", type=int, help="as of l2p sample" + (" (default: 0)" if name == "seed" else ""))
    for name in (*(["guidance"] if guidance else []), "shift", "coarse-strength", "head-memory-mb"):
        add(f"--{name}", type=float, help="as of l2p sample")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="as of l2p sample")
    add("--compile", action="store_true", default=None, help="as of l2p sample")


def add_scoring(parser: argparse.ArgumentParser, out_required: bool = False) -> None:
    add = parser.add_argument
    add("--out", required=out_required, help="folder of images and tables (folder, compare: of the tables alone)")
    add("--reference", help="folder of images that FID compares with; needs --inception")
    add("--inception", help="torch-fidelity's weights of Inception v3: FID, FID-patch, Inception Score")
    add("--resize", type=int, default=0, help="side in pixels that both sets are brought to for FID (default: as is)")
    add("--clip", help="transformers folder of a CLIP: CLIP score")
    add("--long-clip", help="folder of a Long-CLIP, FG-CLIP or FG-CLIP 2: CLIP score of long captions")
    add("--lpips", help="torchvision's weights of AlexNet or VGG-16: diversity of the images of a prompt")
    add("--captions", help="CSV or JSON lines with image and prompt (default: what our images say of themselves)")
    add("--period", type=int, help="of the patch grid in px; 0: not measured (default: the model's patch, if known)")
    add("--cache", help="folder of computed features (default: features in --out; else none)")
    add("--resamples", type=int, default=200, help="of the bootstrap (default: 200)")
    add("--device", help="as of l2p sample; the networks of scores run there, too")


def check_scoring(args: argparse.Namespace) -> None:
    """What can be wrong before torch is imported."""
    for name, least, most in (("resamples", 2, 1_000_000), ("resize", 0, 65536), ("period", 0, 65536)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise FieldError(name, f"must be from {least} to {most}, got {value}")
    if args.reference is not None and args.inception is None:
        raise UserError("--reference is for FID, which needs --inception as well")
    for name, folder in (("reference", 1), ("inception", 0), ("clip", 1), ("long_clip", 1), ("lpips", 0)):
        given = getattr(args, name)
        if given is not None and not (Path(given).is_dir() if folder else Path(given).is_file()):
            raise FieldError(name, f"{given} is not a {'folder' if folder else 'file'}")
