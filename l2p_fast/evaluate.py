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

from .errors import FieldError, UserError, option_names, run_cli
from .evaluation.arguments import build_parser, check_scoring
from .evaluation.scorefiles import read_scores
from .evaluation.suites import EACH, SAMPLERS, WAYS, Work, plan, read_tasks, tasks_of, write_lists
from .evaluation.table import Row, markdown, pivot, save_table
from .sampling.facts import ModelFacts, check_lora, check_memory, check_text_encoder, find_model
from .sampling.jobs import read_prompts
from .sampling.request import Request, Setup, check_number, check_size, choose
from .startup import all_stays

if TYPE_CHECKING:
    from .evaluation.imagesets import Item
    from .evaluation.scoring import Judges
    from .sampling.session import Session

GRID_PROMPTS = ("a red star above two blue circles", "a black square", "three green triangles", "a black ring")


def settle(args: argparse.Namespace) -> tuple[Setup, Request, ModelFacts]:
    """What draws and how, checked as far as it can be without loading anything; the prompt is still empty."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    if args.res is not None and (args.height is not None or args.width is not None):
        raise UserError("give --res or --height and --width, not both")
    if args.res is not None:
        check_number("height", args.res, "res")
        given |= {"height": args.res, "width": args.res}
    request, setup = Request.from_dict({"prompt": "", "seed": 0} | given), Setup.from_dict(given)
    height, width = request.height or request.width, request.width or request.height
    model = find_model(setup.model, max(height, width) if height else None)
    check_text_encoder(setup.text_encoder, model)
    for lora in setup.lora:
        check_lora(lora)
    height, width = height or model.native_size, width or model.native_size
    for field, side in (("height", height), ("width", width)):
        try:
            check_size(field, side, model.size_multiple)
        except FieldError as error:
            raise FieldError("res" if args.res is not None else field, error.problem) from None
    check_memory(height, width, model.size_multiple or 64)
    setup = replace(setup, model=model.name)
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
    waiting = [work for work in works if not work.is_finished(setup)]
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
    if not all(work.is_finished(setup) for work in works):
        print("other parts are missing; once they are drawn, the same command scores all of them")
        return
    from .evaluation.imagesets import items_of_works

    if suite == "pixverve" and not args.resize and request.height == request.width:
        args.resize = request.height  # what its scorer brings the real images to
    judges = load_judges(args, (model.patch_size or 0) if args.period is None else args.period)
    items = items_of_works(suite, works, out)
    if suite == "pixverve" and judges.reference:  # what is in both, in the benchmark's order
        held = {item.path.stem: item for item in judges.reference}
        items = [item for item in items if item.path.stem in held]
        judges.reference = [held[item.path.stem] for item in items]
    rows += judged(items, judges, args.resamples)
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
    from .evaluation.imagesets import items_of_works

    setup, request, model = settle(args)
    check_number("num_images", args.num_images)
    prompts = read_prompts("prompts_file", args.prompts_file) if args.prompts_file else GRID_PROMPTS
    samplers = [choose("samplers", name, SAMPLERS) for name in args.samplers.split(",")]
    ways = [choose("ways", name, WAYS) for name in args.ways.split(",")]
    try:
        scales = [float(text) for text in args.guidances.split(",")] if args.guidances else [None]
    except ValueError:
        raise FieldError("guidances", f"must be numbers with commas, got {args.guidances!r}; try 1,2,4") from None
    judges, tasks, session = load_judges(args, args.period or model.patch_size or 16), tasks_of(prompts), None
    found: dict[str, list[Row]] = {}
    for sampler, scale, way in itertools.product(samplers, scales, ways):
        label = f"{sampler}, guidance {'as the model has it' if scale is None else format(scale, 'g')}, {way}"
        out = Path(args.out) / re.sub(r"[^\w.]+", "-", label)
        works = plan("prompts", tasks, replace(request, guidance=scale), args.num_images or 1, out)
        session = draw(session, setup, works, sampler, way)
        found[label] = judged(items_of_works("prompts", works, out), judges, args.resamples)
    print(pivot(found), end="")
    rows = [replace(row, name=f"{label}: {row.name}") for label, rows in found.items() for row in rows]
    save_table(rows, Path(args.out), {"model": model.name, "request": request.as_dict()}, pivot(found))
    print(f"wrote {Path(args.out) / 'scores.md'} and scores.json")


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's). A wrong argument or file is a `UserError`."""
    args = build_parser().parse_args(argv)
    with option_names():
        check_scoring(args)
        {"folder": run_folders, "compare": run_folders, "grid": run_grid}.get(args.command, run_suite)(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
