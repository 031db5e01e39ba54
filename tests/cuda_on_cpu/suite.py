"""Runs the ops' own tests, and `probes.py`, with a library of `build.py` in place of the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .build import ROOT

# Two processes, of about the same work.
PARTS = (
    ("test_head_ops.py", "test_activate_ops.py", "cuda_on_cpu/probes.py"),
    ("test_ops.py", "test_dit_ops.py", "test_update_ops.py"),
)
# What tells nothing of a kernel.
LEFT_OUT = (
    "a_broken_extension",
    "a_kernel_that_disagrees",
    "avx2",
    "composed_is_plain",
    "cuda_equals_cpu",
    "cuda_is_reference",
    "float32",
    "each_is_the_others_backward",
    "mistakes_are_named",
    "packing",
    "rms_norm_module",
    "without_the_extension",
)


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest's run of some tests, with its options."""
    tests = [f"tests/{argument}" for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    if library.name.startswith("asan"):
        options.append("-s")  # a process that AddressSanitizer ends would take what it said along
    plugins = ["-p", "tests.cuda_on_cpu.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *options, "-k", f"not ({' or '.join(LEFT_OUT)})", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment(library), text=True, capture_output=True)


def run_all(library: Path, *options: str) -> tuple[int, str]:
    """Failed parts, and what the runs printed."""
    with ThreadPoolExecutor(len(PARTS)) as pool:
        done = list(pool.map(lambda part: run(library, *part, *options), PARTS))
    return sum(part.returncode != 0 for part in done), "".join(part.stdout + part.stderr for part in done)


def environment(library: Path) -> dict[str, str]:
    given = {**os.environ, "L2P_CUDA_ON_CPU": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if library.name.startswith("asan"):
        # Python is not built with AddressSanitizer, which wants to come first, and to find what it wraps.
        found = [
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        given |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
    return given
