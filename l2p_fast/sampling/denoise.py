"""From noise to pixels: the loop, and the network's predictions under guidance, in as much memory as there is.

B images, R = 2B rows with guidance (B without), H x W pixels, N steps.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .. import ops
from ..errors import UserError
from ..models.detailer import AUTO_MEMORY_MB
from . import flow, graphs
from .editing import Kept, bands

logger = logging.getLogger(__name__)

# On a CPU two rows in one batch save little time and cost their memory, so past this many pixels they go one by one.
_CPU_BATCH_PIXELS = 1024 * 1024
# Working memory of the head, in MB, to try next after running out of memory.
_SMALLER_HEAD_MB = (AUTO_MEMORY_MB, 64.0, 16.0)


class Stop(Exception):
    """Raised by ``on_step``: the loop ends with the state that it has."""


def denoise(
    predict: Predictor,
    pixels: Tensor,
    scheduler: Any,
    guidance: Callable[[float], float],
    begin: int = 0,
    on_step: Callable[[int, Tensor], Tensor | None] | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Follow the flow from step ``begin`` of the schedule to its end.

    Args:
        predict: the network's raw outputs, x0 - eps.
        pixels: (B, 3, H, W) fp32, the state at the noise level of step ``begin``; written over.
        scheduler: a flow-matching scheduler whose timesteps are set.
        guidance: asked before each step, with its noise level, for the guidance scale; up to 1: none, which takes half
            the work.
        begin: index of the first step.
        on_step: called after each step with its index and the state, which the next step writes over. It may return
            another state, or raise `Stop`.
        kept: the pixels of an image that are not drawn, or not yet.

    Returns:
        (B, 3, H, W) fp32, about in [-1, 1].

    Raises:
        UserError: a state that isn't finite; the message names the step.
    """
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    fused, finite = is_euler(scheduler), _Finite(len(timesteps), predict.dtype)
    scheduler.set_begin_index(begin)
    for i in range(begin, len(timesteps)):
        scale = guidance(float(sigmas[i]))
        raw, negative = predict(pixels, i, guided=scale > 1)
        moved = pixels  # Euler's step is taken in place
        if not fused:
            v = flow.velocity(raw.float())
            if negative is not None:
                v = flow.guide(v, flow.velocity(negative.float()), scale)
            moved = scheduler.step(v, timesteps[i], pixels, return_dict=False)[0]
        for rows in [slice(None)] if kept is None else bands(pixels.shape):
            held = None if kept is None else kept.after(pixels, rows, float(sigmas[i + 1] / sigmas[i]))
            if fused:
                halves = [half if half is None else half[:, :, rows] for half in (raw, negative)]
                ops.euler_step_(pixels[:, :, rows], halves[0], float(sigmas[i + 1] - sigmas[i]), halves[1], scale)
            if held is not None:
                kept.put_(moved, held, rows, i)
        pixels = moved
        finite.note(i, pixels)
        if on_step is not None:
            try:
                changed = on_step(i, pixels)
            except Stop:
                break
            pixels = pixels if changed is None else changed
    finite.check()
    return pixels


def is_euler(scheduler: Any) -> bool:
    """Whether the scheduler's step is the one that `ops.euler_step` fuses with guidance."""
    return type(scheduler) is FlowMatchEulerDiscreteScheduler and not scheduler.config.stochastic_sampling


class _Finite:
    """Notes whether the state is finite after each step. A GPU's answers are read at the end, so no step waits."""

    def __init__(self, steps: int, dtype: torch.dtype):
        self.steps, self.dtype = steps, dtype
        self.sums: list[tuple[int, Tensor]] = []

    def note(self, step: int, pixels: Tensor) -> None:
        self.sums.append((step, pixels.sum()))  # one read of the state; any NaN or infinity is in it
        if pixels.device.type == "cpu":
            self.check()

    def check(self) -> None:
        bad = [step for step, total in self.sums if not torch.isfinite(total)]
        self.sums.clear()
        if bad:
            half = "use bfloat16 or float32, " if self.dtype == torch.float16 else ""
            raise UserError(
                f"the image is not finite after step {bad[0] + 1} of {self.steps} (weights in "
                f"{str(self.dtype).removeprefix('torch.')}): {half}lower the guidance scale, or check the weights and "
                "the text features for NaN"
            )


class Predictor:
    """The network's predictions at the times of one schedule, and how to go on when memory runs out.

    Rows are the B positive samples, then the B negative ones. ``rows_at_once`` of them run as a batch: R, B, or one.
    Out of memory, the head's bands get narrower first (that costs little time), then fewer rows run at once.

    Args:
        transformer: an `L2PTransformer2DModel`.
        caps, negative_caps: B text features each; no negative ones: no guidance.
        size: (height, width) in pixels.
        times: (N,) model times 1 - sigma.
        cfg_batch: both halves of guidance as one batch: True, False, or "auto" (True until memory forbids).
        cuda_graph: run the network by CUDA graphs where that can be (`graphs`), and say why where not.
    """

    def __init__(
        self,
        transformer: nn.Module,
        caps: Sequence[Tensor],
        negative_caps: Sequence[Tensor],
        size: tuple[int, int],
        times: Tensor,
        cfg_batch: bool | str = "auto",
        cuda_graph: bool = False,
    ):
        self.transformer, self.dtype = transformer, transformer.dtype
        self.caps = [*caps, *negative_caps]
        self.batch, self.size = len(caps), size
        device = self.caps[0].device
        self.times = times.to(device)
        self.forced = cfg_batch is True
        self.rows_at_once = len(self.caps)
        if cfg_batch is False or (cfg_batch == "auto" and one_by_one(device, size)):
            self.rows_at_once = self.batch
        self._conditions: dict[tuple[int, int], Any] = {}
        self._graphed = None
        if cuda_graph:
            if why := graphs.obstacle(transformer, device):
                logger.warning("no CUDA graph is used: %s", why)
            else:
                self._graphed = graphs.Graphed(functools.partial(_network, transformer))

    @property
    def cfg_batched(self) -> bool | None:
        """Whether both halves of guidance run as one batch; None: there is no guidance."""
        return None if len(self.caps) == self.batch else self.rows_at_once == len(self.caps)

    @property
    def positive(self) -> list[Tensor]:
        """Text features of the B samples."""
        return self.caps[: self.batch]

    def replace_positive(self, caps: Sequence[Tensor]) -> None:
        """Go on with other text features of the B samples."""
        self.caps[: self.batch] = caps
        self._conditions.clear()

    def __call__(self, pixels: Tensor, step: int, guided: bool = True) -> tuple[Tensor, Tensor | None]:
        """Raw outputs (B, 3, H, W) at ``step`` of the schedule: of the prompts, and of the negative ones if guided."""
        while True:
            try:
                return self._raw(pixels, step, guided)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not self._retreat():
                    raise
            if self._graphed is not None:
                self._graphed.forget()
            gc.collect()  # outside the handler: the exception's frames held the tensors
            if pixels.is_cuda:
                torch.cuda.empty_cache()

    def _raw(self, pixels: Tensor, step: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        total = len(self.caps) if guided else self.batch
        raw = []
        for start in range(0, total, self.rows_at_once):
            rows = range(start, min(start + self.rows_at_once, total))
            key = rows.start, rows.stop
            if key not in self._conditions:
                self._conditions[key] = self.transformer.prepare(
                    self.caps[rows.start : rows.stop], *self.size, timesteps=self.times
                )
            samples = [row % self.batch for row in rows]
            x = pixels if samples == list(range(self.batch)) else pixels[samples]
            t = self.times[step].expand(len(rows))
            with self._cache(f"{key} at {self.size}"):
                raw.append(self._run(x, t, self._conditions[key], step, alone=len(rows) == total))
        if len(raw) > total // self.batch:  # row by row
            raw = [torch.cat(raw)]
        halves = raw[0].split(self.batch) if len(raw) == 1 else raw
        return halves[0], halves[1] if len(halves) > 1 else None

    def _run(self, pixels: Tensor, t: Tensor, cond: Any, step: int, alone: bool) -> Tensor:
        """The network's output; ``alone``: the only one of this step."""
        if self._graphed is None:
            return self.transformer(pixels, t, cond=cond, step=step)
        out = self._graphed(pixels, t, type(cond), vars(cond.at(step)))
        return out if alone else out.clone()  # the next call may write over it

    def _cache(self, name: str) -> contextlib.AbstractContextManager:
        """What diffusers' caches keep for other rows, or for another size, must not be mixed with this call's."""
        enabled = getattr(self.transformer, "is_cache_enabled", False)
        return self.transformer.cache_context(name) if enabled else contextlib.nullcontext()

    def _retreat(self) -> bool:
        """Choose a smaller way of running and say so; False: there is none."""
        head = self.transformer.head
        now = head.memory_mb or (math.inf if self.caps[0].is_cuda else AUTO_MEMORY_MB)
        if smaller := next((mb for mb in _SMALLER_HEAD_MB if mb < now), None):
            head.memory_mb, head.band_rows = smaller, None  # kept for later runs: they would run out as well
            self._conditions.clear()  # in which it is settled how the head runs
            logger.warning("out of memory: retrying with head bands of %g MB", smaller)
        elif self.rows_at_once > self.batch and not self.forced:
            self._run_at_once(self.batch)
            logger.warning("out of memory: retrying with the two halves of guidance one after the other")
        elif self.rows_at_once > 1 and not self.forced:
            self._run_at_once(1)
            logger.warning("out of memory: retrying with one image at a time")
        else:
            return False
        return True

    def _run_at_once(self, rows: int) -> None:
        self.rows_at_once = rows
        self._conditions.clear()


def _network(transformer: nn.Module, pixels: Tensor, t: Tensor, kind: type, cond: dict[str, Any]) -> Tensor:
    """The network's output at one step, of what is given alone."""
    return transformer(pixels, t, cond=kind(**cond), step=0)


def one_by_one(device: torch.device, size: tuple[int, int]) -> bool:
    """Whether the two halves of guidance run one after the other when nothing else is asked for."""
    return device.type == "cpu" and size[0] * size[1] > _CPU_BATCH_PIXELS


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
