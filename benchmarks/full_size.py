"""Memory at the full width of 6B, measured on a CPU: loading, drawing and a training step, each in its own process.

``python -m benchmarks.full_size FOLDER`` writes random weights there once (12.3 GB for each of the two models, in
pieces), then measures and prints a row at a time; ``--json FILE`` keeps them. A row has the peak of resident memory
beyond what the process held before (Linux' own count: Python and the libraries, 0.5 GB, are not in it) and what the
planner of the same thing tells: `sampling.footprint` or ``l2p train --dry-run``.

Of the blocks ``--blocks N`` of each stack are computed while drawing, as each takes and gives back the same memory;
the others, loaded all the same, hand on what they are given. 0 computes all.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .measure import instruction_set, watched_memory

DTYPE = torch.bfloat16
PATCHES = {1024: 16, 4096: 64}
TEXT_TOKENS = 64
STEPS = 2
TRAIN_TOKENS = 256
POOL = (1 << 22) - 3  # random values that are used again and again
ROWS = ("load bf16", "load int8", "load nf4", "draw 1024", "draw 4096", "train")


def weights(folder: Path, patch: int) -> Path:
    """The random checkpoint of the published model of ``patch``, written if it isn't there."""
    from l2p_fast.formats.write import Piece, write_pieces
    from l2p_fast.loading import build_empty

    path = folder / f"random-{patch}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {key: tuple(p.shape) for key, p in build_empty({"all_patch_size": (patch,)}).state_dict().items()}
        pool = torch.rand(POOL, generator=torch.Generator().manual_seed(0)) * 2 - 1  # drawing billions takes long

        def piece(key: str, shape: tuple[int, ...]) -> Piece:
            weight = key.removesuffix("bias") + "weight" if key.endswith(".bias") else key
            norm, bound = len(shapes[weight]) == 1, math.prod(shapes[weight][1:]) ** -0.5

            def draw(kind: torch.dtype) -> Iterator[torch.Tensor]:
                values = torch.ones(POOL, dtype=kind) if norm else (pool * bound).to(kind)
                for start in range(0, math.prod(shape), POOL):
                    yield values[: math.prod(shape) - start]

            return Piece(shape, DTYPE, draw)

        write_pieces({key: piece(key, shape) for key, shape in shapes.items()}, path)
    return path


# --- The rows --------------------------------------------------------------------------------------------------------
# Each makes what is not to be counted, then returns what is measured and the bytes that the planner tells.


def load(folder: Path, name: str, _: int) -> tuple[Callable[[], object], int]:
    from l2p_fast.loading import build_empty, load_model
    from l2p_fast.quantize import products

    path, quantize = weights(folder, 16), None if name == "bf16" else name
    model = build_empty({"all_patch_size": (16,)})
    if quantize:
        products.quantize_blocks(model, quantize)
    told = sum(p.numel() for p in model.parameters()) * DTYPE.itemsize + sum(b.nbytes for b in model.buffers())
    return lambda: load_model(path, DTYPE, quantize=quantize), told


def draw(folder: Path, size: str, blocks: int) -> tuple[Callable[[], object], int]:
    from l2p_fast.loading import build_empty, load_model
    from l2p_fast.quantize import products
    from l2p_fast.sampling import footprint
    from l2p_fast.sampling.pipeline import L2PPipeline, make_scheduler
    from l2p_fast.sampling.request import Request, Setup
    from l2p_fast.sampling.session import Session

    side = int(size)
    path = weights(folder, PATCHES[side])
    model = build_empty({"all_patch_size": (PATCHES[side],)})
    products.quantize_blocks(model, "nf4")
    told = footprint.expected(model, DTYPE, torch.device("cpu"), (side, side), TEXT_TOKENS).total

    def run() -> None:
        model = load_model(path, DTYPE, quantize="nf4")
        if blocks:
            for stack in (model.noise_refiner, model.context_refiner, model.layers):
                for block in list(stack)[blocks:]:
                    block.forward = lambda x, *_, **__: x
        caps = torch.randn(TEXT_TOKENS, model.config.cap_feat_dim)
        pipe = L2PPipeline(model, None, None, make_scheduler())
        pipe.set_progress_bar_config(disable=True)
        session = Session(pipe, Setup(quantize="nf4"), texts=lambda prompts: [caps] * len(prompts))
        session.draw(Request("", 0, height=side, width=side, steps=STEPS, guidance=1.0))

    return run, told


def train(folder: Path, _: str, __: int) -> tuple[Callable[[], object], int]:
    from l2p_fast.formats.checkpoint import Checkpoint
    from l2p_fast.loading import build_empty
    from l2p_fast.training import memory
    from l2p_fast.training.build import build
    from l2p_fast.training.config import load_config
    from l2p_fast.training.freeze import freeze
    from l2p_fast.training.objective import losses
    from l2p_fast.training.optim import AdamW
    from l2p_fast.training.parallel import Workers

    path = weights(folder, 16)
    config = load_config(
        Path(__file__).parents[1] / "configs/24gb.yaml",
        [f"model.base={path}", "model.frozen_bits=4", f"data.grids=[{{tokens: {TRAIN_TOKENS}, batch: 1}}]",
         "device=cpu"],
    )  # fmt: skip
    empty = build_empty(Checkpoint(path).l2p_config())
    freeze(empty, config.freeze)
    memory.TEXT_TOKENS = TEXT_TOKENS
    told = memory.expected(config, empty).total

    def run() -> None:
        model, trained = build(config, Workers(0, 1, torch.device("cpu")))
        optimizer = AdamW(trained, config.optim)
        optimizer.fuse()
        side = 16 * math.isqrt(TRAIN_TOKENS)
        x0, noise = torch.rand(1, 3, side, side) * 2 - 1, torch.randn(1, 3, side, side)
        texts = [torch.randn(TEXT_TOKENS, model.config.cap_feat_dim, dtype=DTYPE)]
        losses(model, x0, noise, torch.rand(1), texts).mean().backward()
        optimizer.finish()

    return run, told


def measured(folder: Path, row: str, blocks: int) -> dict:
    """One row, in this process."""
    kind, _, which = row.partition(" ")
    run, told = {"load": load, "draw": draw, "train": train}[kind](folder, which, blocks)
    warm = torch.randn(1, 16, 64, 64, requires_grad=True)  # the libraries' own buffers
    torch.nn.functional.conv2d(warm, torch.randn(16, 16, 3, 3)).sum().backward()
    del warm
    gc.collect()
    start = time.perf_counter()
    with watched_memory("cpu") as memory:
        run()
    return {
        "row": row, "measured_gb": memory["extra_mb"] * 2**20 / 1e9, "told_gb": told / 1e9,
        "ratio": memory["extra_mb"] * 2**20 / told, "seconds": time.perf_counter() - start,
    } | ({"blocks_computed": blocks or "all"} if kind == "draw" else {})  # fmt: skip


def rows(folder: Path, wanted: list[str], blocks: int) -> Iterator[dict]:
    """Each row, from a process of its own."""
    for row in wanted:
        command = [sys.executable, "-m", "benchmarks.full_size", str(folder), "--child", row, "--blocks", str(blocks)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            yield {"row": row, "failed": f"the process ended with code {done.returncode}"}
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the random weights are, or go: 25 GB")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--blocks", type=int, default=0, help="of each stack, computed while drawing; 0: all")
    parser.add_argument("--json", type=Path, help="rows are kept here; those that are there already stay")
    parser.add_argument("--child", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.folder, args.child, args.blocks)))
        return
    for patch in {64 if row == "draw 4096" else 16 for row in args.only}:
        weights(args.folder, patch)
    kept = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for row in rows(args.folder, args.only, args.blocks):
        print(json.dumps(row), flush=True)
        kept = [other for other in kept if other["row"] != row["row"]] + [row]
        if args.json:
            facts = {"torch": torch.__version__, "instruction_set": instruction_set(), "dtype": str(DTYPE),
                     "text_tokens": TEXT_TOKENS, "steps": STEPS, "train_tokens": TRAIN_TOKENS}  # fmt: skip
            kept.sort(key=lambda other: ROWS.index(other["row"]))
            args.json.write_text(json.dumps({"machine": facts, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
