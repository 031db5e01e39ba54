"""Images from prompts on the command line: ``python -m l2p_fast.sample "a red star" --res 1024 --out star.png``.

Everything that can be wrong with the arguments is checked before torch or diffusers is imported, so a mistake is
answered at once. Images are drawn one at a time, each with its own seed, so an image is the same alone or among many,
and its file holds what repeats it (``--from-image``).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import FieldError, Parser, UserError, option_names, run_cli
from .models.attention import DOWNLOADS
from .sampling.drawing import FORMATS, LARGEST_SIDE, read_image, read_mask, read_settings
from .sampling.facts import (
    BUNDLED,
    LARGE,
    ModelFacts,
    check_lora,
    check_memory,
    check_text_encoder,
    find_draft,
    find_model,
)
from .sampling.jobs import Job, is_finished, plan_jobs, read_prompts
from .sampling.request import REPLACES, Lora, Request, Setup, check_number, choose, drawn_size
from .startup import all_stays, hide_unused

if TYPE_CHECKING:
    from .sampling.session import Session


NAMED = ("model", "draft", "text_encoder", "image", "mask")  # settings that name files


def build_parser() -> argparse.ArgumentParser:
    """The options. All default to None, so that what was given can be told from what was not."""
    parser = Parser(prog="l2p sample", description="Draw images of prompts.")
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add("--model", help="file, folder or pipeline folder; tiny-1k or tiny-4k: bundled (default: by the size)")
    add("--text-encoder", help="folder or hub id with text_encoder/ and tokenizer/, such as Tongyi-MAI/Z-Image-Turbo")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="a LoRA over the model; may be given several times")
    add("--res", type=int, help="height and width in pixels (default: the model's own)")
    add("--height", type=int, help="in pixels")
    add("--width", type=int, help="in pixels")
    add("--steps", type=int, help="denoising steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale; 1 switches it off (default: the model's)")
    add("--guidance-interval", metavar="LOW,HIGH", help="noise levels at which there is guidance (default: all, 0,1)")
    add("--shift", type=float, help="shift of the noise schedule (default: the model's, 3)")
    add("--negative", help='prompt to steer away from (default: "")')
    add("--num-images", type=int, help="images of each prompt, with seeds counting up (default: 1)")
    add("--seed", type=int, help="of the first image (default: a random one, printed and kept in the image)")
    add("--prompts-file", help="one prompt a line; finished images are skipped, so an interrupted run goes on")
    add("--image", help="start from this image")
    add("--strength", type=float, help="how much of --image to replace, above 0 and at most 1 (default: 0.6, or 1)")
    add("--mask", help="draw only where this image of --image's size is white; gray: less strongly")
    add("--outpaint", metavar="L,T,R,B", help="add pixels to --image: left, top, right, bottom")
    add("--mask-blend", type=int, metavar="PX", help="how far the seam reaches into what is drawn (half a patch)")
    add("--refine", type=float, metavar="STRENGTH", help="bring --image, or what --draft draws, to the model's size")
    add("--draft", help="the model that draws the small image of --refine (default: tiny-1k for a bundled model)")
    add("--coarse-size", type=int, help="tokens a side of the coarse start; 0: none (default: the model's)")
    add("--coarse-strength", type=float, help="noise level at which full size takes over (default: the model's)")
    add("--dtype", help="bf16, fp32, fp16 or auto: the checkpoint's own (default)")
    add("--device", help="cpu, cuda, cuda:1, mps, xpu or auto: a GPU if there is one (default)")
    add("--attention", help="a diffusers attention backend such as native, flash, sage or xformers (default: auto)")
    add("--quantize", help="weights in fewer bits: fp8, int8 (8bit), nf4 (4bit) or none: as the file is (default)")
    add("--compile", action="store_true", default=None, help="torch.compile the transformer's blocks")
    add("--cuda-graph", action="store_true", default=None, help="run the steps by CUDA graphs, where that can be")
    add("--offload", help="what waits in host memory: none (default), text, blocks, model, sequential or auto")
    add("--head-memory-mb", type=float, help="working memory of the head (default: 256; on CUDA half of what is free)")
    add("--cfg-batch", help="on, off or auto: both halves of guidance as one batch (default: auto)")
    add("--format", help="png, jpg or webp (default: by --out, else png)")
    add("--out", help="file, or folder when there are several images")
    add("--from-image", help="repeat this image, pixel for pixel; options given beside it override")
    add("--trust", action="store_true", default=None, help="load the models and files that --from-image names")
    add("--dry-run", action="store_true", help="say what memory it takes, from the files' headers, and draw nothing")
    add("--device-gb", type=float, metavar="GB", help="with --dry-run: plan for a GPU that has this much memory free")
    add("--no-progress", action="store_true", help="no progress bar")
    return parser


def recall(given: dict[str, Any], path: str, trust: bool) -> dict[str, Any]:
    """``given`` over the settings of an image. Nothing that a stranger's image names is loaded without ``trust``."""
    stored = read_settings("--from-image", path)
    names = Setup.field_names() + Request.field_names()
    try:  # types and ranges
        Setup.from_dict({k: v for k, v in stored.items() if k != "attention"})  # that may ask for a package
        Request.from_dict({"prompt": "", "seed": 0} | stored)
    except FieldError as error:
        raise UserError(f"--from-image: the settings in {path} are damaged ({error})") from error
    if stored.get("version") != __version__:
        print(
            f"note: made by l2p_fast {stored.get('version')}, this is {__version__}; pixels may differ", file=sys.stderr
        )
    gone = given.keys() | {name for key in given for name in REPLACES.get(key, ())}
    stored = {k: v for k, v in stored.items() if k in names and v is not None and k not in gone}
    if stored.get("device", "auto").split(":")[0] not in ("auto", "cpu"):
        stored["device"] = "auto"  # that machine's; pixels may differ on another device
        print("note: pixels may differ from one device to another", file=sys.stderr)
    named = {k: [stored[k]] for k in NAMED if k in stored and stored[k] not in BUNDLED}
    if stored.get("lora"):
        named["lora"] = list(map(str, map(Lora.of, stored["lora"])))
    if stored.get("attention") in DOWNLOADS:
        named["attention"] = [stored["attention"]]
    if named and not trust:
        options = " ".join(f"--{k.replace('_', '-')} {v!r}" for k, values in named.items() for v in values)
        raise UserError(f"--from-image: {path} names {options}; add these options, or --trust to load what it names")
    return stored | given


def settle(args: argparse.Namespace) -> tuple[Setup, Request, list[str], ModelFacts]:
    """What is asked for: checked as far as it can be without loading anything."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    if args.prompt is not None and args.prompts_file is not None:
        raise UserError("give a prompt or --prompts-file, not both")
    if args.res is not None and (args.height is not None or args.width is not None):
        raise UserError("give --res or --height and --width, not both")
    if args.res is not None:
        check_number("height", args.res, "res")
        given |= {"height": args.res, "width": args.res}
    if args.from_image is not None:
        given = recall(given, args.from_image, bool(args.trust))
    check_number("num_images", args.num_images)
    prompts = [given.get("prompt")]
    if args.prompts_file is not None:
        prompts = read_prompts("prompts_file", args.prompts_file)
    if prompts == [None]:
        raise UserError('what to draw? give a prompt, as in "a red star above two blue circles", or --prompts-file')
    if not all(prompt.strip() for prompt in prompts):
        raise UserError('the prompt is empty; say what to draw, as in "a red star above two blue circles"')
    if args.format is not None:
        args.format = choose("format", {"jpeg": "jpg"}.get(args.format.lower(), args.format.lower()), FORMATS)
    seed = given.get("seed", random.SystemRandom().randrange(2**32))
    request = Request.from_dict(given | {"prompt": prompts[0], "seed": seed})
    setup = Setup.from_dict(given)

    image = None if request.image is None else read_image("--image", request.image).size
    if request.mask is not None:
        read_mask("--mask", request.mask, image)
    own = None if image is None else image[::-1]
    try:
        # nothing is known of the model yet: the bundled one is chosen by the size
        longest = max(drawn_size(request, own, 1 if request.refine is None else LARGE, 1))
        model = find_model(setup.model, longest)
        height, width = drawn_size(request, own, model.native_size, model.size_multiple)
    except FieldError as error:
        sides = ("height", "width") if args.res is not None else ()
        raise FieldError("res" if error.field in sides else error.field, error.problem) from None
    check_text_encoder(setup.text_encoder, model)
    for lora in setup.lora:
        check_lora(lora)
    drafted = request.refine is not None and image is None
    if args.draft is not None and not drafted:
        raise FieldError("draft", "has no effect without {refine}, or beside {image}; leave it out")
    setup = replace(setup, draft=find_draft(setup.draft, setup.text_encoder, model).name if drafted else None)
    check_memory(height, width, model.size_multiple or 64)
    given |= {"prompt": prompts[0], "seed": seed, "height": height, "width": width}
    return setup, Request.from_dict(given), prompts, model


def draw(session: Session, job: Job, format: str, bar: bool, small: Path | None = None) -> None:
    """Draw one image, from a ``small`` one if there is, write it and print a line about it."""
    start = time.perf_counter()
    session.pipeline.set_progress_bar_config(disable=not bar)
    drawing = session.draw(job.request, image=None if small is None else read_image("--refine", str(small)))
    drawing.save(job.path, format)
    size, seconds = f"{drawing.image.width}x{drawing.image.height}", time.perf_counter() - start
    print(f"{job.path}  {size}  seed {job.request.seed}  {drawing.pace()}  {seconds:.1f} s", flush=True)


def run(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.device_gb is not None and not (args.dry_run and 0 < args.device_gb < 1e6):
        raise UserError("--device-gb is a GPU's free memory in GB, above 0, and goes with --dry-run")
    setup, request, prompts, model = settle(args)
    if args.dry_run:
        with all_stays():
            from .sampling.footprint import plan
        print(plan(setup, request, model, args.device_gb))
        return 0
    folder = None if args.prompts_file is None else Path(args.prompts_file).stem
    jobs, format = plan_jobs(request, prompts, args.num_images or 1, args.out, args.format, folder)
    limit = LARGEST_SIDE.get(format)
    if limit and max(request.height, request.width) > limit:
        raise FieldError("format", f"{format} holds at most {limit} pixels a side; try {{format}} png")
    if format == "jpg" and request.edits:
        print("note: jpg changes every pixel; png and webp keep those outside the mask", file=sys.stderr)
    if args.prompts_file is not None:
        waiting = [job for job in jobs if not is_finished(job, setup, any_seed=args.seed is None)]
        if len(waiting) < len(jobs):
            print(f"{len(jobs) - len(waiting)} of {len(jobs)} images are finished and skipped")
        jobs = waiting
    if not jobs:
        return 0

    with all_stays():
        from .sampling.session import Session, draw_small
    bar = sys.stderr.isatty() and not args.no_progress
    with TemporaryDirectory() as folder:
        small = [None] * len(jobs)
        if setup.draft is not None:
            print(f"draft      {setup.draft} draws the small images first", flush=True)
            small = draw_small(setup, [job.request for job in jobs], Path(folder), bar)
        with all_stays():
            session = Session.load(setup, max(request.height, request.width))
        for line in session.report:
            print(line)
        print(f"attention  {session.choose_attention(request.height, request.width)}", flush=True)
        for job, start in zip(jobs, small, strict=True):
            draw(session, job, format, bar, start)
    print(f"peak memory {session.peak_memory()}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's).

    Returns:
        0.

    Raises:
        UserError: a wrong argument or file; `run_cli` turns it into one line and exit code 2.
    """
    with option_names():
        return run(argv)


if __name__ == "__main__":
    hide_unused()
    run_cli(main)
