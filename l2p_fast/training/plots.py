"""The curves of trainings, as images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files import atomic_path
from .monitor import LOG, read_log

SMOOTHING = 0.95


def smooth(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Running mean, unbiased at its start; a value that isn't finite (a skipped step) leaves a gap of its own alone."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if math.isfinite(value) else math.nan)
    return out


def draw_curves(runs: Sequence[Path], out: Path) -> None:
    """Loss, loss by noise level, gradient norm and speed over the steps of each run, as one PNG.

    Raises:
        UserError: no log, or no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install l2p_fast[train]") from error
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for run in runs:
        name = run.name.replace("$", r"\$")  # no formula
        lines = read_log(run)
        if not lines:
            raise UserError(f"{run} holds no {LOG} with steps; give the folder of a training")
        steps = [line["step"] for line in lines]
        for axis, key in ((axes[0], "loss"), (axes[2], "grad_norm"), (axes[3], "images_per_second")):
            axis.plot(steps, smooth([line[key] for line in lines]), label=name)
        for level in sorted({level for line in lines for level in line["loss_by_sigma"]}):
            points = [(line["step"], line["loss_by_sigma"][level]) for line in lines if level in line["loss_by_sigma"]]
            axes[1].plot([p[0] for p in points], smooth([p[1] for p in points]), label=f"{name}, sigma {level}")
    for axis, title in zip(axes, ("loss", "loss by noise level", "norm of the gradient", "images/s"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[:3]:
        plain_log_scale(axis.yaxis)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=100)


def plain_log_scale(axis) -> None:
    """A logarithmic matplotlib ``axis`` whose ticks are plain numbers: 1, 2, 5, 10, or finer where it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log")
    low, high = axis.get_view_interval()
    narrow = low > 0 and high / low < 5  # so few of 1, 2, 5 that other round numbers say more
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
