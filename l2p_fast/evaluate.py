"""Judging models and images: ``python -m l2p_fast.evaluate geneval evaluation_metadata.jsonl --out runs/geneval``.

A benchmark's images are drawn where its own scorer looks for them, and scored with whatever is given: networks by their
paths, and the scorer's file once it is there. The same command again draws and computes only what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FieldError, Parser, UserError, run_cli
from .evaluation.scorefiles import read_scores
from .evaluation.suites import EACH, SAMPLERS, WAYS, Work, plan, read_tasks, tasks_of, write_lists
from .evaluation.table import Row, markdown, save_table
from .sampling.facts import ModelFacts, check_memory, check_text_encoder, find_model
from .sampling.jobs import read_prompts
from .sampling.request import Request, Setup, check_number, check_size, choose
from .startup import all_stays

if TYPE_CHECKING:
    from .evaluation.imagesets import Item
    from .evaluation.scoring import Judges
    from .sampling.session import Session

GRID_PROMPTS = ("a red star above two blue circles", "a black square", "three green triangles", "a black ring")


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
    texts = ("model", "text-encoder", "negative", "dtype", "attention", "quantize", "offload", "cfg-batch")
    for name in texts:
        add(f"--{name}", help="as of l2p sample")
    for name in ("res", "height", "width", "steps", "seed", "coarse-size"):
        add(f"--{name}", type=int, help="as of l2p sample" + (" (default: 0)" if name == "seed" else ""))
    for name in (*(["guidance"] if guidance else []), "shift", "coarse-strength", "head-memory-mb"):
        add(f"--{name}", type=float, help="as of l2p sample")
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


def settle(args: argparse.Namespace) -> tuple[Setup, Request, ModelFacts]:
    """What draws and how, checked as far as it can be without loading anything; the prompt is still empty."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    if args.res is not None and (args.height is not None or args.width is not None):
        raise UserError("give --res or --height and --width, not both")
    if args.res is not None:
        given |= {"height": args.res, "width": args.res}
    request, setup = Request.from_dict({"prompt": "", "seed": 0} | given), Setup.from_dict(given)
    height, width = request.height or request.width, request.width or request.height
    model = find_model(setup.model, max(height, width) if height else None)
    check_text_encoder(setup.text_encoder, model)
    height, width = height or model.native_size, width or model.native_size
    for field, side in (("height", height), ("width", width)):
        check_size(field, side, model.size_multiple)
    check_memory(height, width, model.size_multiple or 64)
    return setup, replace(request, height=height, width=width), model


def load(setup: Setup, request: Request) -> Session:
    with all_stays():
        from .sampling.session import Session

        session = Session.load(setup, max(request.height, request.width))
    for line in session.report:
        print(line, flush=True)
    return session


def draw(
    session: Session | None, setup: Setup, works: Sequence[Work], sampler: str = "euler", way: str = "none"
) -> Session | None:
    """Draw what is missing; the session that did, if any had to."""
    waiting = [work for work in works if not work.is_finished()]
    if len(waiting) < len(works):
        print(f"{len(works) - len(waiting)} of {len(works)} files are finished and skipped", flush=True)
    if waiting:
        session = session or load(setup, works[0].requests[0])
        from .evaluation.render import draw_works, varied

        plain = (sampler, way) == ("euler", "none")
        draw_works(session if plain else varied(session, sampler, way), waiting)
    return session


def judged(items: Sequence[Item], judges: Judges, resamples: int) -> list[Row]:
    from .evaluation.bootstrap import judge
    from .evaluation.scoring import statistics_of

    return judge(statistics_of(items, judges), resamples)


def tell(rows: Sequence[Row], out: str | None, **facts: Any) -> None:
    print(markdown(rows), end="")
    if out is not None:
        save_table(rows, Path(out), facts)
        print(f"wrote {Path(out) / 'scores.md'} and scores.json")


def load_judges(args: argparse.Namespace, period: int) -> Judges:
    """The networks that are named."""
    from .evaluation.scoring import load_judges

    cache = args.cache or (Path(args.out) / "features" if args.out else None)
    paths = {name: getattr(args, name) for name in ("inception", "clip", "long_clip", "lpips") if getattr(args, name)}
    return load_judges(paths, args.reference, args.resize, period, cache, args.device)


def run_suite(args: argparse.Namespace) -> None:
    suite, out = args.command, Path(args.out)
    tasks = read_tasks(suite, args.prompts, choose("caption", getattr(args, "caption", "long"), ("long", "short")))
    check_number("num_images", args.num_images)
    part, _, parts = args.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= 100_000):
        raise FieldError("shard", f"must read N/M with N from 1 to M, got {args.shard!r}; try 1/1")
    setup, request, model = settle(args)
    works = plan(suite, tasks, request, args.num_images or EACH[suite], out)
    rows = read_scores(suite, args.scores, tasks) if args.scores is not None else []
    draw(None, setup, works[int(part) - 1 :: int(parts)])
    write_lists(suite, works, out)
    if not all(work.is_finished() for work in works):
        print("other parts are missing; once they are drawn, the same command scores all of them")
        return
    from .evaluation.imagesets import items_of_works

    judges = load_judges(args, (model.patch_size or 0) if args.period is None else args.period)
    if suite == "pixverve" and judges.reference:  # only what is in both, in the benchmark's order
        held = {item.path.stem: item for item in judges.reference}
        judges.reference = [held[task.key] for task in tasks if task.key in held]
    rows += judged(items_of_works(suite, works, out), judges, args.resamples)
    tell(rows, args.out, suite=suite, model=model.name, prompts=len(tasks), request=request.as_dict())


def run_folders(args: argparse.Namespace) -> None:
    from .evaluation.bootstrap import compare, judge
    from .evaluation.imagesets import items_of_folder
    from .evaluation.scoring import statistics_of

    folders = [args.folder] if args.command == "folder" else [args.first, args.second]
    items = [items_of_folder(folder, args.captions) for folder in folders]
    judges = load_judges(args, args.period or 0)
    statistics = [statistics_of(one, judges) for one in items]
    if not statistics[0]:
        raise UserError("nothing to score with; give --period, --clip, --lpips, or --inception and --reference")
    rows = judge(*statistics, args.resamples) if len(folders) == 1 else compare(*statistics, args.resamples)
    tell(rows, args.out, folders=folders)


def run_grid(args: argparse.Namespace) -> None:
    """Draw with every combination of sampler, guidance and way of moving the grid, and measure."""
    setup, request, model = settle(args)
    check_number("num_images", args.num_images)
    prompts = read_prompts("prompts_file", args.prompts_file) if args.prompts_file else GRID_PROMPTS
    samplers = [choose("samplers", name, SAMPLERS) for name in args.samplers.split(",")]
    ways = [choose("ways", name, WAYS) for name in args.ways.split(",")]
    try:
        scales = [float(text) for text in args.guidances.split(",")] if args.guidances else [None]
    except ValueError:
        raise FieldError("guidances", f"must be numbers with commas, got {args.guidances!r}; try 1,2,4") from None
    period, each = args.period or model.patch_size or 16, args.num_images or 1
    rows, session = [], None
    for sampler, scale, way in itertools.product(samplers, scales, ways):
        label = f"{sampler}, guidance {'default' if scale is None else format(scale, 'g')}, {way}"
        out = Path(args.out) / re.sub(r"[^\w.]+", "-", label)
        tasks = tasks_of(prompts)
        works = plan("prompts", tasks, replace(request, guidance=scale), each, out)
        session = draw(session, setup, works, sampler, way)
        from .evaluation.imagesets import items_of_works

        judges = load_judges(args, period)
        rows += [
            replace(row, name=f"{label}: {row.name}")
            for row in judged(items_of_works("prompts", works, out), judges, args.resamples)
        ]
    tell(rows, args.out, model=model.name, period=period, request=request.as_dict())


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). A wrong argument or file is a `UserError`."""
    args = build_parser().parse_args(argv)
    try:
        check_scoring(args)
        {"folder": run_folders, "compare": run_folders, "grid": run_grid}.get(args.command, run_suite)(args)
    except FieldError as error:
        raise UserError(error.worded(lambda name: "--" + name.replace("_", "-"))) from error
    return 0


if __name__ == "__main__":
    run_cli(main)
