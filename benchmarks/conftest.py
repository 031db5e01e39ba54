"""Shared by all benchmarks: validate, then time; report shares of what this machine does, measured in the same run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from l2p_fast import ops

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def seconds(run: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Median wall time of ``run`` after one warm-up, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    run()
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def copy_bandwidth() -> Callable[[str], float]:
    """device -> bytes a second, read plus written, of PyTorch's own copy of 256 MiB."""
    known: dict[str, float] = {}

    def measure(device: str) -> float:
        if device not in known:
            source = torch.ones(2**26, device=device)
            target = torch.empty_like(source)
            known[device] = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
        return known[device]

    return measure


@pytest.fixture
def timed(benchmark, device):
    """Time with pytest-benchmark, waiting for the device; returns the median in seconds."""

    def run(call: Callable[[], object], **facts: object) -> float:
        def waited():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(facts)
        benchmark.pedantic(waited, rounds=9, warmup_rounds=2)
        return benchmark.stats.stats.median

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["platform"] = platform.platform()
    machine_info["extension"] = ops.extension_status()
