"""``python -m l2p_fast.train CONFIG.yaml [key=value ...]``: train an L2P model.

A run lives in one folder and goes on where it was when the same command is given again. One process by default;
``torchrun --standalone --nproc-per-node N -m l2p_fast.train CONFIG.yaml --fsdp run=FOLDER`` shares the model among N.
"""

from __future__ import annotations

import argparse

from .errors import Parser, UserError, run_cli
from .training.config import check, load_config


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m l2p_fast.train", description=__doc__)
    p.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="the run's settings; see configs/")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="over the file's, as in optim.lr=1e-4")
    p.add_argument("--run", metavar="FOLDER", help="the same as run=FOLDER; with torchrun use that")
    p.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="checkpoint to go on from (default auto)")
    p.add_argument("--fsdp", action="store_true", help="share the model among the processes of torchrun")
    p.add_argument("--hybrid", action="store_true", help="with --fsdp: share within a node, copy across nodes")
    p.add_argument("--dry-run", action="store_true", help="print the plan and the memory it takes; train nothing")
    p.add_argument("--device-gb", type=float, metavar="GB", help="with --dry-run: judge for a device of this memory")
    p.add_argument("--processes", type=int, default=1, help="with --dry-run --fsdp: how many share the model")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    path, overrides = args.config, args.overrides
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    config = load_config(path, overrides)
    config.run = args.run or config.run
    config.parallel.fsdp |= args.fsdp
    config.parallel.hybrid |= args.hybrid
    check(config)
    if args.processes < 1:
        raise UserError(f"--processes must be at least 1, got {args.processes}")
    if args.processes > 100_000:
        raise UserError(f"--processes must be at most 100000, got {args.processes}")
    if args.device_gb is not None and not 0 < args.device_gb < 1e9:
        raise UserError(f"--device-gb must be a device's memory in GB, got {args.device_gb:g}")
    if args.dry_run:
        from .training.memory import plan  # here and below: a mistake is told before PyTorch is there

        print(plan(config, args.processes, args.device_gb))
        return 0
    from .training.loop import train
    from .training.parallel import start

    workers = start(config)
    try:
        train(config, workers, args.resume)
    finally:
        workers.close()
    return 0


if __name__ == "__main__":
    run_cli(main)
