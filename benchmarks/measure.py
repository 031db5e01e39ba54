"""One row of the benchmarks: build, validate, time, and watch the memory, in a process of its own.

A process of its own gives every row a fresh heap and a fresh GPU allocator, and a row that runs out of memory, hangs or
crashes takes no other with it: it comes back as a row that says so. Processes are forked from a server that has the
libraries imported and has computed nothing, so they start at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import multiprocessing
import os
import platform
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .counts import Work

OK, OUT_OF_MEMORY, NOT_RUN, OVER_BUDGET, FAILED, WRONG = (
    "ok",
    "out of memory",
    "not run",
    "over budget",
    "failed",
    "wrong",
)
LONG = 10.0  # seconds: a call of this length is its own warm-up and is made once


@dataclass(frozen=True)
class Scale:
    """How large everything is. ``wide`` is the width of a block or head measured alone, ``dim`` that of whole models.

    An image has ``grid`` x ``grid`` patches; 64 is what every published checkpoint was made for. ``patches`` are
    those of whole models; the head alone is measured at all four.
    """

    name: str
    wide: int
    dim: int
    layers: int
    refiners: int
    head_width: float
    vae_channels: tuple[int, int, int, int]
    cap_dim: int
    grid: int = 64
    text_tokens: int = 128
    image_steps: int = 4
    patches: tuple[int, ...] = (16, 64, 128, 160)
    dtype: str = "bfloat16"

    @property
    def free_layers(self) -> int:
        """Blocks at each end that are trained; the rest is frozen."""
        return min(5, self.layers // 3)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def heads(self, dim: int) -> int:
        return max(1, dim // 128)


SCALES = {
    scale.name: scale
    for scale in (
        Scale("full", 3840, 3840, 30, 2, 1.0, (128, 256, 512, 512), 2560),
        Scale("cpu", 3840, 128, 3, 1, 1.0, (32, 32, 32, 32), 256, image_steps=1, patches=(16, 64)),
        Scale("quick", 64, 64, 3, 1, 0.25, (32, 32, 32, 32), 64, grid=4, text_tokens=32, image_steps=2),
    )
}


@dataclass
class Case:
    """What a builder hands over: ``run`` is timed; ``check`` returns its relative error, to be at most ``tolerance``.

    ``against`` says what ``check`` compares with; ``facts`` go into the row.
    """

    run: Callable[[], Any]
    work: Work
    check: Callable[[], float] | None = None
    tolerance: float = 0.0
    against: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    grad: bool = False


class NotHere(Exception):
    """Raised by a case that this machine can't run: its words become the reason of a row that was not run."""


@dataclass(frozen=True)
class Limits:
    """Of one row: seconds for all of it, seconds to spend on rounds, most rounds, bytes of memory (CPU only)."""

    seconds: float
    rounds_seconds: float = 3.0
    rounds: int = 15
    memory: int | None = None


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance in the 2-norm; infinite where the shapes differ or a number is none."""
    if result.shape != expected.shape:
        return float("inf")
    distance = (result.float() - expected.float()).norm() / expected.float().norm()
    return distance.item() if distance.isfinite() else float("inf")


def finite(result: torch.Tensor, shape: tuple[int, ...]) -> float:
    """0 where ``result`` has the shape and no number is missing, else infinite: the check of what has no reference."""
    return 0.0 if tuple(result.shape) == shape and bool(result.isfinite().all()) else float("inf")


class Apart:
    """A generator that runs in a process of its own, value by value as it is asked. Use as a context.

    Args:
        function: called with ``arguments`` there; a generator, or a function that returns one value.
        memory: the limit that the function was given, for the words of a row.
    """

    def __init__(self, function: Callable[..., Any], *arguments, memory: int | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.baselines"])
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(theirs, function, arguments, memory))
        self.process.start()
        theirs.close()

    def ask(self, seconds: float) -> Any:
        """The next value, or a row that says what went wrong: too slow (within ``seconds``), killed, broken."""
        try:
            self.ours.send(None)
            if not self.ours.poll(seconds):
                return {"status": OVER_BUDGET, "reason": f"not done within {seconds:.0f} s"}
            return self.ours.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            if self.process.exitcode == -9:  # the kernel's answer to too much memory
                return {"status": OUT_OF_MEMORY, "reason": "the process was killed"}
            return {"status": FAILED, "reason": f"the process ended with code {self.process.exitcode}"}

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()
        self.ours.close()


def apart(function: Callable[..., Any], *arguments, seconds: float, memory: int | None = None) -> Any:
    """The first value of ``function(*arguments)`` in a process of its own; what goes wrong becomes a row."""
    with Apart(function, *arguments, memory=memory) as process:
        return process.ask(seconds)


def _child(connection, function, arguments, memory) -> None:
    values = None
    while True:
        connection.recv()
        try:
            if values is None:
                values = function(*arguments)
                values = values if inspect.isgenerator(values) else iter([values])
            connection.send(next(values))
        except Exception as problem:
            text = " ".join(str(problem).split())[:300] or type(problem).__name__
            if _is_out_of_memory(problem):
                limit = "" if memory is None else f"needs more than {memory / 2**30:.3g} GB of working memory"
                row = {"status": OUT_OF_MEMORY, "reason": limit or text}
            elif isinstance(problem, (NotHere, ModuleNotFoundError)):
                row = {"status": NOT_RUN, "reason": text}
            else:
                traceback.print_exc()
                row = {"status": FAILED, "reason": text}
            connection.send(row)
            return


def measure(
    build: Callable[..., Case], arguments: dict, device: str, limits: Limits, peaks: dict | None
) -> Iterator[dict | float]:
    """Build the case, run it once while watching the memory, validate it; then time a round each time it is asked.

    Yields:
        first a row: status (`OK`, or why there will be no times) and reason, extra and total peak memory in MB, flops
        and bytes, error and tolerance, the case's facts, ``rounds`` worth asking for; then the seconds of each round.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what errors are measured against
    case = build(**arguments, device=device)
    row: dict[str, Any] = {"flops": case.work.flops, "bytes": case.work.bytes, **case.facts}
    if peaks:
        least = max(case.work.flops / peaks["matmul_flops"], case.work.bytes / peaks["copy_bytes"])
        if least > limits.seconds:
            reason = f"at least {least:.0f} s by its operations, the limit is {limits.seconds:.0f} s"
            yield row | {"status": NOT_RUN, "reason": reason}
            return
    with torch.set_grad_enabled(case.grad):
        if "compiled" in arguments.get("variant", ""):
            case.run()  # the compiler's own time and memory are not the row's
        # On a GPU the second call counts: the first holds the libraries' own trials. On a CPU the first one does, as
        # freed memory need not go back to the system.
        for _ in range(2 if device == "cuda" else 1):
            with limited_memory(limits.memory), watched_memory(device) as memory:
                once = _seconds(case.run, device)
            if once >= LONG:
                break
        row |= memory
        if case.check is not None:
            row |= {"error": case.check(), "tolerance": case.tolerance, "against": case.against}
            if not row["error"] <= case.tolerance:
                reason = f"error {row['error']:.3g} against {case.against}, at most {case.tolerance:g} allowed"
                yield row | {"status": WRONG, "reason": reason}
                return
        rounds = 1
        if once < LONG:  # what takes long is not run again: the first call is its round
            once = _seconds(case.run, device)
            rounds = max(1, min(limits.rounds, int(limits.rounds_seconds / once)))
        yield row | {"status": OK, "reason": "", "rounds": rounds}
        yield once
        while True:
            yield _seconds(case.run, device)


def add_times(row: dict, seconds: list[float], peaks: dict) -> None:
    """Put the median of ``seconds`` into a row, and which share of the machine's measured peaks it means."""
    row["median_s"] = statistics.median(seconds)
    row["share_of_matmul"] = row["flops"] / row["median_s"] / peaks["matmul_flops"]
    row["share_of_copy"] = row["bytes"] / row["median_s"] / peaks["copy_bytes"]


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Time of one call; on a GPU between two events, with its cache flushed before."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flusher().zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flusher() -> torch.Tensor:
    """More than any GPU's cache holds."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


@contextlib.contextmanager
def watched_memory(device: str):
    """Yields a dict that gets ``extra_mb``, the peak beyond what was held before, and ``total_mb``, the peak.

    CUDA: what the allocator handed out. CPU: resident memory by Linux' own count; empty where that can't be reset.
    """
    memory: dict[str, float] = {}
    gc.collect()
    if device == "cuda":
        ours = _flusher().nbytes
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - ours
        yield memory
        peak = torch.cuda.max_memory_allocated() - ours
    else:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew from what is resident now
        except OSError:
            yield memory
            return
        before = _proc_status("VmRSS")
        yield memory
        peak = _proc_status("VmHWM")
    memory |= {"extra_mb": (peak - before) / 2**20, "total_mb": peak / 2**20}


def _proc_status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


@contextlib.contextmanager
def limited_memory(limit: int | None):
    """Let this process allocate ``limit`` bytes more: beyond that PyTorch raises, instead of the kernel killing."""
    if limit is None or not os.path.exists("/proc/self/status"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_proc_status("VmData") + limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _is_out_of_memory(problem: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "bad_alloc", "out_of_memory")
    # oneDNN says no more than this when its own scratch memory can't be had
    words += ("could not execute a primitive", "could not create a memory object")
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(word in str(problem) for word in words)


def instruction_set() -> str:
    """The CPU's vector instructions, on which times in bfloat16 depend most."""
    from l2p_fast import ops

    fast = "with" if ops.cpu_has_fast_bf16() else "without"
    limited = " (by L2P_CPU)" if os.environ.get("L2P_CPU") else ""
    return f"{torch.backends.cpu.get_cpu_capability()}{limited}, {fast} bfloat16"


def machine(device: str, dtype: str) -> dict[str, Any]:
    """What this machine is and does: `peaks` for `measure`, names and versions."""
    from l2p_fast import __version__, ops

    side, bytes_ = (8192, 2**31) if device == "cuda" else (2048, 2**28)
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.ones(bytes_ // 4, device=device)
    target = torch.empty_like(source)

    def median(run: Callable[[], Any]) -> float:
        run()
        return statistics.median(_seconds(run, device) for _ in range(7))

    return {
        "matmul_flops": 2 * side**3 / median(lambda: a @ b),
        "copy_bytes": 2 * source.nbytes / median(lambda: target.copy_(source)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "instruction_set": instruction_set(),
        "l2p_fast": __version__,
        "extension": ops.extension_status(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
    except importlib.metadata.PackageNotFoundError:
        return None
