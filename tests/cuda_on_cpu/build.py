"""Compiles the extension with its CUDA kernels in place of the CPU's, to be run by `emulator.cpp`. Needs g++ alone.

What was compiled once from the same text is kept in build/cuda_on_cpu, object by object.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "cuda_on_cpu"

COMMON = ["-std=c++20", "-g1", "-fPIC", "-DL2P_WITH_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Shared memory is thread_local, and never constructed. What nvcc alone warns of is no concern here.
KERNEL = ["-x", "c++", "-D__CUDA_ARCH__=800", "-fno-extern-tls-init", "-ffp-contract=off", "-Wno-unknown-pragmas"]
UNDEFINED = ["-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero"]
ADDRESS = ["-fsanitize=address"]
# kind: flags of the kernels, flags of all else, sources of the emulator
KINDS = {
    "plain": (["-O1", *UNDEFINED], [], ["emulator.cpp", "sanitizers.cpp"]),
    "race": (["-O1", "-fsanitize=thread"], ["-DEMULATOR_RACE"], ["emulator.cpp", "race.cpp"]),
    "asan": (["-O1", *UNDEFINED, *ADDRESS], ADDRESS, ["emulator.cpp", "sanitizers.cpp"]),
}


def obstacle() -> str | None:
    """Why the kernels can't be run here. None: they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator switches stacks on Linux x86-64 only"
    return None if shutil.which("g++") else "no g++"


def build(kind: str, csrc: Path = ROOT / "csrc", probes: Path = HERE / "probes.cu") -> Path:
    """The library of one kind, of the kernels in ``csrc`` and in ``probes``."""
    kernel_flags, flags, emulator = KINDS[kind]
    includes = [Path(torch.__file__).parent / "include", HERE / "include", csrc]
    common = [*COMMON, *(f"-I{path}" for path in includes)]
    faces = [path for path in sorted(csrc.glob("*.cpp")) if (csrc / f"{path.stem}_cuda.cu").exists()]
    jobs = [
        *((path, [*common, *kernel_flags, *KERNEL]) for path in (*sorted(csrc.glob("*.cu")), probes)),
        *((path, [*common, "-O1", *flags, "-include", str(HERE / "include/on_cpu.h")]) for path in faces),
        *((HERE / name, [*common, "-O2", *flags]) for name in emulator),
    ]
    headers = hashlib.sha256()
    for folder in (csrc, HERE, HERE / "include"):
        for path in sorted(folder.glob("*.*h")) + sorted(folder.glob("*.h")):
            headers.update(path.name.encode() + path.read_bytes())
    headers.update(torch.__version__.encode())

    def compiled(job: tuple[Path, list[str]]) -> Path:
        source, options = job
        shown = [option.replace(str(csrc), "csrc") for option in options]
        key = hashlib.sha256(headers.digest() + " ".join(shown).encode() + source.read_bytes()).hexdigest()[:20]
        target = OUT / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            run(["g++", *options, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    OUT.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        # the slowest first
        objects = list(pool.map(compiled, sorted(jobs, key=lambda job: -job[0].stat().st_size)))
    key = hashlib.sha256(" ".join(sorted(path.name for path in objects)).encode()).hexdigest()[:20]
    library = OUT / f"{kind}-{key}.so"
    if not library.exists():
        torch_libraries = Path(torch.__file__).parent / "lib"
        partial = library.with_suffix(f".{os.getpid()}")
        link = [*(ADDRESS if kind == "asan" else []), f"-L{torch_libraries}", "-Wl,--no-as-needed", "-ltorch"]
        run(["g++", "-shared", *map(str, objects), "-o", str(partial), *link])
        partial.replace(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
