"""The benchmarks' options, and the fixture that turns one measured row into one pytest-benchmark entry.

``pytest benchmarks/ --benchmark-json=benchmarks/results/cpu.json`` runs everything; ``python -m benchmarks.report``
makes the table and the plots. Each row runs in a process of its own (`measure`), round by round as pytest-benchmark
asks; its clock (`Clock`) is the one of that process, which on a GPU reads events. Memory, counted work, shares of what
the machine does and ratios to the baselines are in ``extra_info``. A row without times (out of memory, no compiler,
over budget, a missing package) is there as well and says why. ``--rows FILE`` gets each row as a JSON line as it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, replace

import pytest
import torch

from l2p_fast.ops import cpu_has_fast_bf16

from . import measure
from .measure import FAILED, NOT_RUN, OK, SCALES, WRONG, Limits, Scale

OURS = "ours"
# What matters most comes first, in case the time runs out: the head with all that it is compared with, a 4K step, a
# training step.
FIRST = (("test_head", ""), ("test_step", "4K-ours"), ("test_step", "lowbit"), ("test_step", "4K-plain"),
         ("test_train", "4K"), ("test_train", ""))  # fmt: skip
THEN = ("test_step", "test_ops", "test_block", "test_attention", "test_image")
GIB = 2**30


def pytest_addoption(parser) -> None:
    group = parser.getgroup("l2p_fast benchmarks")
    add = group.addoption
    add("--device", choices=("cpu", "cuda"), default=None, help="default: L2P_BENCH_DEVICE, else cuda if there is one")
    add("--scale", choices=tuple(SCALES), help="sizes: full is the 6B model, and the default on a GPU; cpu; quick")
    add("--quick", action="store_true", help="--scale quick: everything small, in about a minute")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile rows; auto: on a GPU")
    add("--row-seconds", type=float, default=90, help="limit of one row (default 90)")
    add("--total-seconds", type=float, default=600, help="rows not begun by then become rows that say so (default 600)")
    add("--rows", help="file to which each row is added as a JSON line when it ends")
    add("--memory-gb", type=float, default=12, help="on the CPU: limit of a row's working memory (default 12)")


class Clock:
    """Shows the seconds that measured processes have spent in rounds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class Session:
    """What the rows of one run share."""

    def __init__(self, config):
        option = config.getoption
        asked = option("device") or os.environ.get("L2P_BENCH_DEVICE")
        self.device: str = asked or ("cuda" if torch.cuda.is_available() else "cpu")
        usual = "full" if self.device == "cuda" else "cpu"
        self.scale: Scale = SCALES["quick" if option("quick") else option("scale") or usual]
        if self.device == "cpu" and not cpu_has_fast_bf16():
            self.scale = replace(self.scale, dtype="float32")
        self.compile = option("compile") == "on" or (option("compile") == "auto" and self.device == "cuda")
        self.row_seconds, self.started = option("row_seconds"), time.monotonic()
        self.total_seconds = option("total_seconds")
        self.memory = int(option("memory_gb") * GIB) if self.device == "cpu" else None
        self._machine: dict | None = None

    @property
    def machine(self) -> dict:
        """Names, versions, measured peaks of the machine; made once."""
        if self._machine is None:
            self._machine = measure.apart(measure.machine, self.device, self.scale.dtype, seconds=120)
            if "matmul_flops" not in self._machine:
                pytest.exit(f"the machine's peaks could not be measured: {self._machine['reason']}", returncode=3)
        return self._machine

    def limits(self, variant: str) -> Limits | dict:
        """Of a row that is to begin now, or the row that says why it can't."""
        if "compiled" in variant:
            if not self.compile:
                return {"status": NOT_RUN, "reason": "torch.compile is off here; --compile on"}
            if self.device == "cpu" and not (shutil.which("g++") or shutil.which("c++") or os.environ.get("CXX")):
                return {"status": NOT_RUN, "reason": "torch.compile needs a C++ compiler; install g++"}
        left = self.started + self.total_seconds - time.monotonic()
        if left < 3:
            return {"status": NOT_RUN, "reason": f"the run's {self.total_seconds:g} s were over; --total-seconds"}
        limits = Limits(seconds=min(self.row_seconds, left), memory=self.memory)
        if self.scale.name == "quick":
            limits = Limits(limits.seconds, rounds_seconds=0.2, rounds=3, memory=self.memory)
        return limits

    def measure(self, build, variant: str, arguments: dict, benchmark) -> dict:
        """The row of ``build(variant, scale, device, **arguments)``, its rounds driven by ``benchmark``."""
        limits = self.limits(variant)
        if isinstance(limits, dict):
            benchmark.pedantic(lambda: None, rounds=1)  # pytest-benchmark keeps no entry without a time
            return limits
        given = {"variant": variant, "scale": self.scale, **arguments}
        began, seconds = time.monotonic(), []
        with measure.Apart(
            measure.measure, build, given, self.device, limits, self.machine, memory=limits.memory
        ) as process:
            result = process.ask(limits.seconds)

            def one_round() -> None:
                if result["status"] == OK:
                    took = process.ask(max(1.0, began + limits.seconds - time.monotonic()))
                    if isinstance(took, dict):  # it ran before, and does no more
                        result.update(took)
                    else:
                        seconds.append(took)
                        CLOCK.now += took

            benchmark.pedantic(one_round, rounds=result.pop("rounds", 1))
        if result["status"] == OK:
            measure.add_times(result, seconds, self.machine)
        return result


SESSION = pytest.StashKey[Session]()


def pytest_configure(config) -> None:
    config.stash[SESSION] = Session(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, pytest still writes the rows it has


def pytest_report_header(config) -> str:
    session = config.stash[SESSION]
    scale = session.scale
    return (
        f"l2p_fast benchmarks: {session.device}, {scale.dtype}, scale {scale.name}: models of width {scale.dim}, "
        f"{scale.layers} layers, autoencoder {'-'.join(map(str, scale.vae_channels))}; "
        f"blocks and heads alone at width {scale.wide}"
    )


def pytest_collection_modifyitems(items) -> None:
    def place(item) -> tuple[bool, bool, int]:
        module, compiled = item.module.__name__.rpartition(".")[2], "compiled" in item.name
        for i, (name, part) in enumerate(FIRST):
            if module == name and part in item.name and (module == "test_head" or not compiled):
                return False, compiled, i
        slow = "block_lowbit" in item.name  # on a CPU
        return True, compiled or slow, THEN.index(module) if module in THEN else len(THEN)

    items.sort(key=place)


@pytest.fixture(scope="session")
def scale(request) -> Scale:
    return request.config.stash[SESSION].scale


@pytest.fixture
def row(request, benchmark):
    """``row(build, level, name, resolution, variant, **arguments)``: measure ``build(variant, scale, device,
    **arguments)`` and record it. A row without times skips the test, a wrong or broken one fails it."""
    session = request.config.stash[SESSION]

    def record(build, level: str, name: str, resolution: int, variant: str, **arguments) -> dict:
        benchmark.group = f"{level} {name}"
        result = session.measure(build, variant, arguments, benchmark)
        facts = {"level": level, "name": name, "resolution": resolution, "variant": variant}
        facts |= {"device": session.device, "dtype": session.scale.dtype, **result}
        benchmark.extra_info.update(facts)
        if journal := request.config.getoption("rows"):
            with open(journal, "a") as file:
                file.write(json.dumps(facts) + "\n")
        if result["status"] in (FAILED, WRONG):
            pytest.fail(f"{result['status']}: {result['reason']}", pytrace=False)
        if result["status"] != OK:
            pytest.skip(f"{result['status']}: {result['reason']}")
        return result

    record.device = session.device
    return record


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Ratios to the baselines, once all are known; the machine, without the names that only its owner knows."""
    session = config.stash[SESSION]
    rows = [entry["extra_info"] for entry in output_json["benchmarks"]]
    add_ratios(rows)
    machine = output_json["machine_info"]
    for key in ("node", "release"):
        machine.pop(key, None)
    machine.get("cpu", {}).pop("flags", None)
    machine["l2p"] = session.machine | {"device": session.device, "scale": asdict(session.scale)}


def add_ratios(rows: list[dict]) -> None:
    """``ratio_to`` (times) and ``memory_ratio_to`` (extra memory) of each of ours to what else was run of its kind."""
    done = [row for row in rows if row["status"] == OK]
    for mine in done:
        if not mine["variant"].startswith(OURS):
            continue
        others = [r for r in done if (r["level"], r["name"]) == (mine["level"], mine["name"]) and r is not mine]
        mine["ratio_to"] = {r["variant"]: mine["median_s"] / r["median_s"] for r in others}
        mine["memory_ratio_to"] = {
            r["variant"]: mine["extra_mb"] / r["extra_mb"] for r in others if mine.get("extra_mb") and r.get("extra_mb")
        }
