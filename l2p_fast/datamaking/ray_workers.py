"""Images of a set by Ray Data: workers of one machine or of a cluster, each with the model in memory.

Work is given out in small pieces, so a fast worker does more of it. One that is killed is started again, and its piece
with it; an image's file says that it is drawn, here as everywhere, so nothing is drawn twice. All machines must see the
set's folder, and whatever else is named, at the same paths.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import FieldError, UserError
from ..sampling.jobs import Job
from .gate import ClipGate
from .image_sets import ImageSet

INSTALL = "pip install l2p_fast[ray]"
PIECE = 16  # images that a worker is given at a time, at the most


class Drawer:
    """One worker. It loads the model when it is given the first image; what it returns says all that went wrong."""

    def __init__(self, made: ImageSet, jobs: Sequence[Job], device: str, folder: str):
        os.chdir(folder)  # what the command names is named from there
        self.made, self.jobs, self.device = made, jobs, device
        self.painter: Any = None
        self.gate: ClipGate | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = self.jobs[row["job"]]
        try:
            if self.painter is None:
                self.painter, _ = self.made.source.painter(self.device)
                self.gate = ClipGate(self.made.gate, self.device) if self.made.gate else None
            problem = self.made.draw_one(self.painter, job, self.gate)
        except FieldError as error:
            return row | {"problem": error.problem, "field": error.field, "ends": True}
        except UserError as error:
            return row | {"problem": str(error), "field": "", "ends": True}
        return row | {"problem": problem or "", "field": "", "ends": False}


def draw(made: ImageSet, jobs: Sequence[Job], workers: int | None, device: str) -> Iterator[tuple[Job, str | None]]:
    """Draw ``jobs`` of the set; gives each as it is done, with what `ImageSet.draw_one` returned.

    Args:
        workers: how many; None: one for each GPU, or one where there is none.
        device: of each; "auto": its own GPU, where the cluster has some.

    Raises:
        UserError: Ray is missing, or has too little for so many workers; a model that can't be loaded.
        FieldError: a setting that the model can't take.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--engine ray needs the package ray: {INSTALL}") from error
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"Ray can't be started, or reached: {str(error).splitlines()[0]}") from error
    try:
        yield from _draw(ray, made, jobs, workers, device)
    finally:
        if mine:
            ray.shutdown()


def _draw(
    ray: Any, made: ImageSet, jobs: Sequence[Job], workers: int | None, device: str
) -> Iterator[tuple[Job, str | None]]:
    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    by_gpu = gpus > 0 and device in ("auto", "cuda")
    workers = min(workers or (gpus if by_gpu else 1), len(jobs))
    if workers > (gpus if by_gpu else cpus):
        there = f"{gpus} GPUs" if by_gpu else f"{cpus} CPUs"
        raise FieldError("workers", f"is {workers}, and Ray has {there}; a worker takes one")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    needs = {"num_gpus": 1} if by_gpu else {"num_cpus": max(1, cpus // workers)}
    pieces = max(workers, min(4 * workers, len(jobs)), -(-len(jobs) // PIECE))
    device = "cuda" if by_gpu else "cpu" if device == "auto" else device
    rows = ray.data.from_items([{"job": number} for number in range(len(jobs))], override_num_blocks=pieces).map(
        Drawer,
        fn_constructor_args=(made, jobs, device, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(size=workers),
        **needs,
    )
    for row in rows.iter_rows():
        if row["ends"]:
            raise FieldError(row["field"], row["problem"]) if row["field"] else UserError(row["problem"])
        yield jobs[row["job"]], row["problem"] or None
