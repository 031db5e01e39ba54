"""Mistakes planted on purpose, one at a time: each must be found, by the builds that its entry names."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from .build import HERE, ROOT, build
from .suite import run


class Mutant(NamedTuple):
    mistake: str
    file: str  # of csrc, or of this folder
    before: str
    after: str
    tests: tuple[str, ...]
    found_by: tuple[str, ...]


ALL = ("plain", "race", "asan")
NORM, HEAD, UPDATE, PROBES = (
    ("test_dit_ops.py",),
    ("test_head_ops.py",),
    ("test_update_ops.py",),
    ("cuda_on_cpu/probes.py",),
)

MUTANTS = (
    Mutant(
        "a missing barrier: a tile is used while it is still loaded",
        "head_cuda.cu",
        "      wait_copies(1);\n      __syncthreads();\n",
        "      wait_copies(1);\n",
        HEAD,
        ALL,
    ),
    Mutant(
        "a missing barrier: sums are added up while others still gather them",
        "norm_cuda.cu",
        "  __syncthreads();\n  A* out = static_cast<A*>(d.sums)",
        "  A* out = static_cast<A*>(d.sums)",
        NORM,
        ALL,
    ),
    Mutant(
        "sums of the next row written over those of this one",
        "norm_cuda.cu",
        "sum = block_sum(sum, row & 1);\n    const A r = inverse_root(sum.first / s.width + static_cast<A>(s.eps));\n"
        "    const A along",
        "sum = block_sum(sum, 0);\n    const A r = inverse_root(sum.first / s.width + static_cast<A>(s.eps));\n"
        "    const A along",
        NORM,
        ALL,
    ),
    Mutant(
        "a row's scale from what each warp alone has found",
        "norm_cuda.cu",
        "sum = block_sum<Largest>(sum, row & 1);",
        "sum = {block_sum<Largest>(sum, row & 1).first, lanes_sum<kWarp, Largest>(sum).second};",
        NORM,
        ALL,
    ),
    Mutant(
        "a barrier that only some threads reach",
        "norm_cuda.cu",
        "    part[threadIdx.y][threadIdx.x] = sum;\n    __syncthreads();",
        "    part[threadIdx.y][threadIdx.x] = sum;\n    if (live) __syncthreads();",
        NORM,
        ALL,
    ),
    Mutant(
        "lanes that leave before a shuffle",
        "norm_cuda.cu",
        "    const A r = inverse_root(lanes_sum<kLanes>(sum).first",
        "    if (mine >= slab.end) continue;\n    const A r = inverse_root(lanes_sum<kLanes>(sum).first",
        NORM,
        ALL,
    ),
    Mutant(
        "a shuffle whose mask leaves lanes out",
        "norm_cuda.cu",
        "constexpr unsigned kAll = 0xffffffffu;",
        "constexpr unsigned kAll = 0x0000ffffu;",
        NORM,
        ALL,
    ),
    Mutant(
        "shared memory 64 bytes short",
        "head_cuda.cu",
        "kThreads, shared, stream, s, l);",
        "kThreads, shared - 64, stream, s, l);",
        HEAD,
        ALL,
    ),
    Mutant(
        "more shared memory than an RTX card has",
        "norm_cuda.cu",
        "const int64_t shared = 2 * s.width * static_cast<int64_t>(sizeof(Accumulator<T>));\n  return launch(",
        "const int64_t shared = 9 * s.width * static_cast<int64_t>(sizeof(Accumulator<T>));\n  return launch(",
        NORM,
        ALL,
    ),
    Mutant(
        "vectors read from addresses that are not aligned",
        "patchify_cuda.cu",
        "return is_aligned(pixels) && is_aligned(tokens)",
        "return is_aligned(tokens)",
        ("test_ops.py",),
        ("plain", "asan"),
    ),
    Mutant(
        "registers of a fragment swapped",
        "head_cuda.cu",
        "return unit_of(lane % 16 + first, lane / 16); }",
        "return unit_of(lane / 16 * 8 + lane % 8 + first, lane / 8 % 2); }",
        HEAD,
        ALL,
    ),
    Mutant(
        "a halo short of one row",
        "head_cuda.cu",
        "last = l.stop < l.height ? l.stop + 1 : l.height;",
        "last = l.stop < l.height ? l.stop : l.height;",
        HEAD,
        ALL,
    ),
    Mutant(
        "a halo of one column too many, beyond the image",
        "head_cuda.cu",
        "const bool there = static_cast<unsigned>(c.x) < static_cast<unsigned>(held.width)",
        "const bool there = static_cast<unsigned>(c.x) <= static_cast<unsigned>(held.width)",
        HEAD,
        ALL,
    ),
    Mutant(
        "a window multiplied before its copies came",
        "head_cuda.cu",
        "      wait_copies(1);",
        "      wait_copies(2);",
        HEAD,
        ALL,
    ),
    Mutant(
        "a window overwritten while other warps still read it",
        "head_cuda.cu",
        "      __syncthreads();\n      if (stage + 1 == stages) {",
        "      if (stage + 1 == stages) {",
        HEAD,
        ("race",),
    ),
    Mutant(
        "tiles that no block takes",
        "head_cuda.cu",
        "index += static_cast<int>(gridDim.x) / l.groups",
        "index += static_cast<int>(gridDim.x)",
        HEAD,
        ("plain", "asan"),
    ),
    Mutant(
        "weights sorted for another order of taps",
        "head_cuda.cu",
        "(3 * tap_row + tap_column) * NB + n;",
        "(3 * tap_column + tap_row) * NB + n;",
        HEAD,
        ALL,
    ),
    Mutant(
        "words given to the wrong lane when pixels are put together",
        "head_cuda.cu",
        "upper ? words[i] : words[i + by], by);",
        "upper ? words[i] : words[i + by], 3 - by);",
        HEAD,
        ALL,
    ),
    Mutant(
        "a lost tail: the last element after the whole vectors",
        "silu_cuda.cu",
        "chunks * N + index - chunks; i < d.count) {\n    forward_one",
        "chunks * N + index - chunks; i < d.count - 1) {\n    forward_one",
        NORM,
        ALL,
    ),
    Mutant(
        "a lost tail: too few blocks",
        "patchify_cuda.cu",
        "blocks_for(work, kThreads), kThreads",
        "static_cast<unsigned>(work / kThreads + (work < kThreads)), kThreads",
        ("test_ops.py",),
        ALL,
    ),
    Mutant(
        "a thread beyond the end",
        "patchify_cuda.cu",
        "  if (index >= elements) return;",
        "  if (index > elements) return;",
        ("test_ops.py",),
        ("asan",),
    ),
    Mutant(
        "an offset in 32 bits",
        "update.h",
        "return p.b * stride[0] + p.c * stride[1]",
        "return static_cast<int>(p.b) * static_cast<int>(stride[0]) + p.c * stride[1]",
        UPDATE,
        ALL,
    ),
    Mutant(
        "two rows gathered in one place",
        "norm_cuda.cu",
        "  A* own = sums + threadIdx.x / kLanes * s.width;",
        "  A* own = sums + threadIdx.x / kLanes / 2 * s.width;",
        NORM,
        ALL,
    ),
    Mutant(
        "a copy in the background used before it came",
        "probes.cu",
        "l2p::wait_copies(part + 1 < kTile / 16 ? 1 : 0);",
        "l2p::wait_copies(1);",
        PROBES,
        ALL,
    ),
    Mutant(
        "matrices loaded before the other lanes' copies came",
        "probes.cu",
        "    __syncwarp();\n    uint32_t left[4];",
        "    uint32_t left[4];",
        PROBES,
        ALL,
    ),
    Mutant(
        "rows of a loaded matrix in the wrong order",
        "probes.cu",
        "(part % 2 * 16 + lane % 16) * kRow + lane / 16 * 8",
        "(part % 2 * 16 + lane / 2) * kRow + lane % 2 * 8",
        PROBES,
        ALL,
    ),
)


def found(mutant: Mutant, kind: str) -> str | None:
    """How the mistake shows in a build of one kind. None: it does not."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        shutil.copy(HERE / "probes.cu", folder)
        path = csrc / mutant.file if (csrc / mutant.file).exists() else Path(folder) / mutant.file
        text = path.read_text()
        assert text.count(mutant.before) == 1, f"{mutant.file} has changed: {mutant.before!r} is not there just once"
        path.write_text(text.replace(mutant.before, mutant.after))
        done = run(build(kind, csrc, Path(folder) / "probes.cu"), *mutant.tests, "-x")
    if done.returncode == 0:
        return None
    said = [
        line for line in (done.stdout + done.stderr).splitlines() if line.startswith("E  ") or "ERROR: Addr" in line
    ]
    return said[0].removeprefix("E").strip() if said else f"exit code {done.returncode}"


def report(kinds: tuple[str, ...] = ALL) -> bool:
    """Prints what finds which mistake, and how. False: one is not found by a build that its entry names."""
    good = True
    for mutant in MUTANTS:
        print(f"{mutant.mistake} ({mutant.file})")
        for kind in kinds:
            how = found(mutant, kind)
            missed = how is None and kind in mutant.found_by
            print(f"  {kind}: {'MISSED' if missed else how or 'not found'}"[:200], flush=True)
            good &= not missed
    return good
