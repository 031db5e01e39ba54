"""``python -m examples.tiny STAGE``: make and measure the models of the small world, the bundled ones among them."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2p_fast.errors import Parser, UserError, run_cli

# Of each number that an option takes; all are above 0.
LARGEST = {
    "minutes": 1e5,
    "pictures": 10**7,
    "count": 10**6,
    "per_task": 10**4,
    "seeds": 1000,
    "sides_16": 4096,
    "sides_64": 16384,
    "steps": 10**7,
    "res": 16384,
}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m examples.tiny", description=__doc__)
    stages = p.add_subparsers(dest="stage", required=True)
    ldm = stages.add_parser("ldm", help="train the latent source model (autoencoder, then transformer)")
    ldm.add_argument("--minutes", type=float, default=70, help="training time of the transformer (default 70)")
    ldm.add_argument("--pictures", type=int, default=16384, help="training images drawn and encoded (default 16384)")
    ldm.add_argument(
        "--start", type=Path, help="pixel model whose blocks and text encoder to begin from (default: none)"
    )
    corpus = stages.add_parser("corpus", help="let the source model draw the transfer's training pictures")
    corpus.add_argument("--count", type=int, default=1920, help="pictures (default 1920)")
    transfer = stages.add_parser("transfer", help="turn the source into a pixel model")
    transfer.add_argument("--patch-size", type=int, choices=(16, 64), default=16)
    transfer.add_argument("--minutes", type=float, default=30, help="training time (default 30)")
    bundle = stages.add_parser("bundle", help="the source's transformer with a new head: the models of the package")
    bundle.add_argument("--patch-size", type=int, choices=(16, 64), default=16)
    bundle.add_argument("--minutes", type=float, default=45, help="training time of the head (default 45)")
    bundle.add_argument("--start", type=Path, help="pixel model whose head to begin from (default: none)")
    score = stages.add_parser("score", help="measure renderer, source and pixel models on the fixed prompts")
    score.add_argument("--per-task", type=int, default=40, help="prompts of each of the six tasks (default 40)")
    score.add_argument(
        "--sides-16", type=int, nargs="*", default=[128, 256], help="px of the patch-16 model's pictures"
    )
    score.add_argument("--sides-64", type=int, nargs="*", default=[512], help="px of the patch-64 model's pictures")
    ablate = stages.add_parser("ablate", help="short transfers that differ in one setting, scored and plotted")
    ablate.add_argument("--steps", type=int, default=1500, help="training steps of each run (default 1500)")
    ablate.add_argument("--per-task", type=int, default=12, help="prompts of each of the six tasks (default 12)")
    ablate.add_argument("--other", type=Path, help="folder of another model's pictures with a metadata.csv")
    sheet = stages.add_parser("sheet", help="twelve prompts by the bundled models, and a part of a large image")
    sheet.add_argument("--out", type=Path, default=Path("contact-sheet.png"))
    sheet.add_argument("--res", type=int, default=1024, help="px of a side of each image (default 1024)")
    sheet.add_argument("--large", type=int, default=4096, help="px of a side of the large image (default 4096)")
    road = stages.add_parser("road", help="another source's class, from a latent model to a pixel model and its score")
    road.add_argument("--source", choices=("flux2", "qwen_image"), required=True, help="of which class")
    road.add_argument("--minutes", type=float, default=20, help="training time, half of it the latent model's (20)")
    road.add_argument("--pictures", type=int, default=2000, help="the renderer's, for the latent model (default 2000)")
    road.add_argument("--count", type=int, default=480, help="images that the latent model draws (default 480)")
    road.add_argument("--seeds", type=int, default=4, help="images of each of the 30 prompts to score (default 4)")
    fewer = stages.add_parser("fewer", help="fewer steps, less guidance and caches against the full run")
    fewer.add_argument("--per-task", type=int, default=4, help="prompts of each of the six tasks (default 4)")
    fewer.add_argument("--sides-16", type=int, nargs="*", default=[256], help="px of tiny-1k's images (default 256)")
    fewer.add_argument("--sides-64", type=int, nargs="*", default=[512], help="px of tiny-4k's images (default 512)")
    for stage in (ldm, corpus, transfer, bundle, score, ablate, sheet, road, fewer):
        stage.add_argument(
            "--folder", type=Path, default=Path("runs/tiny"), help="where all is kept (default runs/tiny)"
        )
        stage.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there is one)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name, most in LARGEST.items():
        given = vars(args).get(name, [])
        for value in given if isinstance(given, list) else [given]:
            if not 0 < value <= most:
                raise UserError(f"--{name.replace('_', '-')} must be above 0 and at most {most:g}, got {value}")
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UserError(f"no device {args.device!r}; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here; use --device cpu")
    if args.stage != "sheet":
        args.folder.mkdir(parents=True, exist_ok=True)
    if args.stage == "ldm":
        from . import ldm

        ldm.run(args.folder, device, args.minutes, args.pictures, args.start)
    elif args.stage == "corpus":
        from . import corpus

        corpus.run(args.folder, device, args.count)
    elif args.stage == "transfer":
        from . import transfer

        transfer.run(args.folder, device, args.patch_size, args.minutes)
    elif args.stage == "road":
        from . import road

        road.run(args.folder / args.source, args.minutes, args.pictures, args.count, args.seeds)
    elif args.stage == "bundle":
        from . import bundle

        bundle.run(args.folder, device, args.patch_size, args.minutes, args.start)
    elif args.stage == "ablate":
        from . import ablate

        ablate.run(args.folder, device, args.steps, args.per_task, args.other)
    elif args.stage == "fewer":
        from . import fewer

        fewer.run(args.folder, device, args.per_task, {"tiny-1k": args.sides_16, "tiny-4k": args.sides_64})
    elif args.stage == "sheet":
        from . import score

        score.bundled_sheet(args.out, device, args.res, args.large)
    else:
        from . import score

        score.run(args.folder, device, args.per_task, {16: args.sides_16, 64: args.sides_64})
    return 0


if __name__ == "__main__":
    run_cli(main)
