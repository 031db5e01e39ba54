"""``python -m l2p_fast.plot RUN [RUN ...]``: draw the curves of trainings to ``RUN/curves.png``, or side by side."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .errors import UserError, run_cli
from .files import atomic_path

SMOOTHING = 0.95


def smooth(values: list[float], keep: float = SMOOTHING) -> list[float]:
    """Running mean, unbiased at its start; a value that isn't finite (a skipped step) leaves a gap of its own alone."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if math.isfinite(value) else math.nan)
    return out


def draw(runs: list[Path], out: Path) -> None:
    """Loss, loss by noise level, gradient norm and speed over the steps of each run, as one PNG.

    Raises:
        UserError: no log, or no matplotlib.
    """
    from .training.monitor import LOG, read_log

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install l2p_fast[train]") from error
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for run in runs:
        lines = read_log(run)
        if not lines:
            raise UserError(f"{run} holds no {LOG} with steps; give the folder of a training")
        steps = [line["step"] for line in lines]
        for axis, key in ((axes[0], "loss"), (axes[2], "grad_norm"), (axes[3], "images_per_second")):
            axis.plot(steps, smooth([line[key] for line in lines]), label=run.name)
        for level in sorted({level for line in lines for level in line["loss_by_sigma"]}):
            points = [(line["step"], line["loss_by_sigma"][level]) for line in lines if level in line["loss_by_sigma"]]
            axes[1].plot([p[0] for p in points], smooth([p[1] for p in points]), label=f"{run.name}, sigma {level}")
    for axis, title in zip(axes, ("loss", "loss by noise level", "norm of the gradient", "images/s"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    for axis in axes[:3]:
        axis.set_yscale("log")
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=100)
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m l2p_fast.plot", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training")
    p.add_argument("--out", type=Path, help="the PNG to write (default: curves.png in the first run's folder)")
    args = p.parse_args(argv)
    draw(args.runs, args.out or args.runs[0] / "curves.png")
    return 0


if __name__ == "__main__":
    run_cli(main)
