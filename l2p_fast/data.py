"""From words to training images: ``python -m l2p_fast.data taxonomy|prompts|filter|images|stats``.

Each step reads what the one before wrote, and goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import Counter
from pathlib import Path

from .datamaking import painters
from .datamaking.duplicates import Embeddings
from .datamaking.filters import RULES, Bounds, filter_lines
from .datamaking.gate import ClipGate
from .datamaking.growth import grow
from .datamaking.image_options import ENGINES, add_image_options
from .datamaking.image_sets import ImageSet, Share, read_table, write_shards
from .datamaking.llm_options import add_options, language_model, within
from .datamaking.plan import make_plan
from .datamaking.records import Ledger, Prompt, place, read_lines, read_prompt_file, write_lines
from .datamaking.set_page import measure, prompts_of, write_page
from .datamaking.taxonomy import read_taxonomy
from .datamaking.templates import Grammar
from .datamaking.texts import LANGUAGES
from .datamaking.writing import waiting, write_by_model, write_by_templates
from .errors import FieldError, Parser, UserError, option_names, run_cli
from .sampling.drawing import FORMATS
from .sampling.request import Request, Setup, check_number, choose


def taxonomy(args: argparse.Namespace) -> int:
    found = read_taxonomy(args.taxonomy)
    within(args, "grow", 1, 10_000)
    if args.out:
        place(args.out)
    if args.grow:
        model = language_model(args, wanted=True)
        before = len(found.categories)
        found = grow(found, args.grow, model, print)
        print(f"{len(found.categories) - before} new categories; {model.usage.line()}")
    sizes, before = found.sizes(), ""
    for name, topclass in found.subclasses().items():
        print(f"{topclass if topclass != before else '':<20} {name:<16} {sizes[name]:>5}")
        before = topclass
    print(
        f"{len(set(found.subclasses().values()))} classes, {len(sizes)} sub-classes, {len(found.categories)} categories"
    )
    for problem in found.problems():
        print(f"problem: {problem}")
    if args.out:
        write_lines(args.out, [found.text()])
        print(f"wrote {args.out}")
    return 1 if found.problems() else 0


def prompts(args: argparse.Namespace) -> int:
    within(args, "count", 1, 10_000_000)
    within(args, "quoted_share", 0, 1)
    within(args, "batch", 1, 100)
    check_number("seed", args.seed)
    languages = [choose("languages", name.strip(), LANGUAGES) for name in args.languages.split(",")]
    there = Counter(prompt.category for path in args.also for prompt in read_prompt_file(path))
    model = language_model(args, wanted=False)
    plan = make_plan(read_taxonomy(args.taxonomy), args.count, args.seed, there, languages, args.quoted_share)
    problems: Counter[str] = Counter()
    with Ledger(args.out).held() as ledger:
        left = waiting(ledger, plan)
        if len(left) < len(plan):
            print(f"{len(plan) - len(left)} of {len(plan)} prompts are there")
        if model is None:
            write_by_templates(ledger, plan, left, Grammar(args.seed))
        else:
            try:
                problems = write_by_model(ledger, left, model, args.batch)
            finally:
                print(model.usage.line())
    by = model.name if model else "templates"
    print(f"wrote {args.out}: {len(plan) - problems.total()} of {len(plan)} prompts, by {by}")
    if problems:
        words = ", ".join(f"{number} by {problem}" for problem, number in problems.most_common(4))
        print(f"missing: {words}; the same command asks for them again")
    return 1 if problems else 0


def filter_prompts(args: argparse.Namespace) -> int:
    within(args, "least", 0, 1e5)
    within(args, "most", args.least, 1e5)
    within(args, "near", 0.1, 0.95)
    within(args, "cosine", 0, 1)
    within(args, "limit", 1, 1e9)
    out = place(args.out)
    refusals = place(args.rejected or str(out.with_name(out.stem + ".rejected.jsonl")))
    for path in (out, refusals):
        if path.exists() and os.path.exists(args.prompts) and path.samefile(args.prompts):
            raise UserError(f"{path} is the file that is read; name another --out")
    known = read_taxonomy(args.taxonomy) if args.taxonomy else None
    judge = language_model(args, wanted=args.judge) if args.judge else None
    embeddings = Embeddings(args.embeddings, args.cosine) if args.embeddings else None
    lines = read_lines(args.prompts)
    if args.prompts.endswith(".txt"):
        lines = [(number, Prompt(text.strip()).line()) for number, text in lines]
    bounds = Bounds(args.least, args.most, args.near, known)
    kept, refused, unjudged = filter_lines(lines, bounds, embeddings, judge)
    write_lines(refusals, (item.line() for item in refused))
    write_lines(out, (prompt.line() for prompt in kept[: args.limit]))
    for rule, number in sorted(Counter(item.rule for item in refused).items(), key=lambda item: RULES.index(item[0])):
        example = next(item for item in refused if item.rule == rule)
        print(f"{rule:<12} {number:>6}  as line {example.number}: {example.reason}")
    if judge is not None:
        print(f"judge        {judge.usage.line()}" + (f"; {unjudged} prompts are kept unjudged" if unjudged else ""))
    print(f"kept {len(kept[: args.limit])} of {len(lines)}: {out}; the others, and why: {refusals}")
    return 0


def images(args: argparse.Namespace) -> int:
    if args.model and args.pipeline:
        raise UserError("give --model or --pipeline, not both")
    within(args, "each", 1, 10_000)
    within(args, "shards", 1, 1_000_000)
    within(args, "limit", 1, 1e9)
    if (args.gate is None) != (args.gate_least is None):
        raise UserError("--gate FOLDER and --gate-least SCORE go together")
    within(args, "gate_least", -1, 1)
    written = read_prompt_file(args.prompts)[: args.limit]
    format = choose("format", args.format.lower(), FORMATS)
    by_ray = choose("engine", args.engine, ENGINES) == "ray"
    within(args, "workers", 1, 10_000)
    if args.workers and not by_ray:
        raise UserError("--workers goes with --engine ray; without it torchrun starts the processes")
    check_number("height", args.res, "res")
    height, width = args.height or args.res or args.width, args.width or args.res or args.height
    request = Request("", args.seed, args.negative, height, width, args.steps, args.guidance)
    setup = Setup(
        model=args.model, text_encoder=args.text_encoder, dtype=args.dtype, device=args.device,
        quantize=args.quantize, offload=args.offload, lora=tuple(args.lora or ()),
    )  # fmt: skip
    try:
        source = painters.Source.of(setup, request, args.pipeline)
    except FieldError as error:
        if args.res is None or error.field not in ("height", "width"):
            raise
        raise FieldError("res", error.problem) from None
    share = Share() if by_ray else Share.of_environment()
    made = ImageSet(args.out, written, args.each, source, format, args.gate, args.gate_least)
    mine, waiting, failed = made.jobs[share.rank :: share.world], made.waiting(share), 0
    if len(mine) > len(waiting):
        print(f"{len(mine) - len(waiting)} images are finished and skipped")
    if waiting and not by_ray:  # a model that can't be loaded leaves nothing behind
        painter, report = source.painter(share.device(args.device))
        gate = ClipGate(args.gate, share.device(args.device)) if args.gate else None
        print("\n".join(report), flush=True)
    made.start()
    try:
        if waiting and by_ray:
            from .datamaking import ray_workers

            with contextlib.closing(ray_workers.draw(made, waiting, args.workers, args.device)) as outcomes:
                failed = made.follow(outcomes, len(waiting), bar=not args.no_progress)
        elif waiting:
            failed = made.draw(painter, waiting, gate, bar=share.rank == 0 and not args.no_progress)
    finally:
        kept, rejected = made.write_tables()
        print(f"wrote {args.out}: {kept} of {len(made.jobs)} images" + f", {rejected} below the gate" * bool(args.gate))
    if args.shards and kept and kept + rejected == len(made.jobs):
        print(f"wrote {write_shards(made.folder, args.shards)} shards")
    return 1 if failed else 0


def stats(args: argparse.Namespace) -> int:
    folder = Path(args.what) if os.path.isdir(args.what) else None
    found = read_taxonomy(args.taxonomy)
    place(args.out)
    texts = prompts_of(folder) if folder else read_prompt_file(args.what)
    facts = measure(texts, found, len(read_table(folder)) if folder else 0)
    print("\n".join(facts.lines()))
    write_page(Path(args.out), facts, texts, found, folder)
    print(f"wrote {args.out}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="l2p data", description="From words to training images, step by step.")
    steps = parser.add_subparsers(dest="step", required=True)
    known, llm = Parser(add_help=False), Parser(add_help=False)
    known.add_argument("--taxonomy", metavar="FILE", help="categories (default: those that ship)")
    add_options(llm)

    sub = steps.add_parser("taxonomy", parents=[known, llm], help="count categories, check them, add some by a model")
    sub.add_argument("--grow", type=int, metavar="N", help="add up to N categories to each sub-class")
    sub.add_argument("--out", metavar="FILE", help="where to write the taxonomy")
    sub.set_defaults(run=taxonomy)

    sub = steps.add_parser("prompts", parents=[known, llm], help="write prompts: by a model, or else by templates")
    sub.add_argument("--out", required=True, metavar="FILE.jsonl", help="an interrupted run goes on there")
    sub.add_argument("--count", type=int, default=1000, help="prompts (default: 1000)")
    sub.add_argument("--seed", type=int, default=0, help="of the plan (default: 0)")
    sub.add_argument("--languages", default="en,zh", help="drawn with equal chances (default: en,zh)")
    sub.add_argument("--quoted-share", type=float, default=0.2, help="of prompts with a text to render (default: 0.2)")
    sub.add_argument("--also", action="append", default=[], metavar="FILE", help="its prompts count as there already")
    sub.add_argument("--batch", type=int, default=4, help="prompts a request (default: 4)")
    sub.set_defaults(run=prompts)

    sub = steps.add_parser("filter", parents=[known, llm], help="keep the prompts that are fit to draw")
    sub.add_argument("prompts", help="a .jsonl, a .txt with a prompt a line, or starter: the set that ships")
    sub.add_argument("--out", required=True, metavar="FILE.jsonl", help="what is kept")
    sub.add_argument("--rejected", metavar="FILE.jsonl", help="what is not, and why (default: by --out)")
    sub.add_argument("--least", type=int, default=200, help="characters (default: 200)")
    sub.add_argument("--most", type=int, default=350, help="characters (default: 350)")
    sub.add_argument("--near", type=float, default=0.7, help="share of words of near-duplicates (default: 0.7)")
    sub.add_argument("--embeddings", metavar="FOLDER", help="find near-duplicates by this transformers model, too")
    sub.add_argument("--cosine", type=float, default=0.95, help="of near-duplicates' embeddings (default: 0.95)")
    sub.add_argument("--judge", action="store_true", help="ask the language model about each that is left")
    sub.add_argument("--limit", type=int, metavar="N", help="keep the first N")
    sub.set_defaults(run=filter_prompts)

    sub = steps.add_parser("images", help="draw images of prompts, in the layout that training reads")
    add_image_options(sub)
    sub.set_defaults(run=images)

    sub = steps.add_parser("stats", parents=[known], help="count, and show on one HTML page")
    sub.add_argument("what", help="a file of prompts, starter, or a folder of images")
    sub.add_argument("--out", default="stats.html", metavar="FILE.html", help="the page (default: stats.html)")
    sub.set_defaults(run=stats)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with option_names():
        return args.run(args)


if __name__ == "__main__":
    run_cli(main)
