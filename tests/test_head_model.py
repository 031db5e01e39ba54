"""The model of the head on a GPU counts what a run does, traced op by op on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import head_model
from l2p_fast.models.detailer import DetailerHead, bands
from l2p_fast.models.detailer.fused import Kernels
from l2p_fast.variants import VARIANTS


class Trace(TorchDispatchMode):
    """Every op that launches a kernel with the bytes that it moves, but for weights; the most bytes alive at once."""

    def __init__(self, *inputs):
        super().__init__()
        self.ops, self.peak, self.alive = [], 0, {}
        self.inputs = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
        if func.is_view or "_unsafe_view" in str(func):
            return out
        known = self.inputs | set(self.alive)
        moved = [x for x in args if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in known] + results
        self.ops.append((str(func), sum(x.nbytes for x in moved)))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for x in results:
            storage = x.untyped_storage()
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_launches_and_memory_are_those_of_a_run(name):
    variant = VARIANTS[name]
    side = variant.native_size
    with torch.device("meta"):
        head = DetailerHead(variant.patch_size, 3840).bfloat16()
        pixels = torch.empty(1, 3, side, side)
        features = torch.empty(1, 64 * 64, 3840, dtype=torch.bfloat16).unflatten(1, (64, 64)).permute(0, 3, 1, 2)
    run = Kernels(head, head.table_banded, torch.bfloat16)
    model = list(head_model.launches(variant.levels, head.table_banded, 3840, (64, 64), side, side))
    with Trace(pixels, features) as trace:
        image = head._inner(run, pixels, features, first=0)
    assert image.shape == pixels.shape
    last = [launch for launch in model if launch.name == "image"]  # a second launch of the last level's op
    assert len(last) == (variant.levels[0].dec > 16)
    for launch, (op, moved) in zip([launch for launch in model if launch not in last], trace.ops, strict=True):
        kind = "l2p_fast.head_" if launch.own else "l2p_fast.activate" if "activate" in launch.name else "aten."
        assert op.startswith(kind)
        # Blocks of other outputs read the same again.
        assert launch.bytes >= moved if launch.own else launch.bytes == moved, (launch, op, moved)
    held = max(launch.held for launch in model)
    assert held <= trace.peak <= held + image.nbytes
    planned = bands.whole_bytes(head.levels, (1, side, side), torch.bfloat16, head.table_banded)
    assert held <= planned <= 1.02 * held


def test_targets():
    """At 4096 px 40 launches, with 5 that look for changed weights, 6 ms and 1.2 GB; at 10240 px 3 GB."""
    for name, milliseconds, most in (("4k", 6, 1.2e9), ("10k", 8, 3e9)):
        variant = VARIANTS[name]
        side = variant.native_size
        outer = sum(level.enc <= 64 for level in variant.levels)
        made = list(head_model.launches(variant.levels, outer, 3840, (64, 64), side, side))
        assert len(made) + 5 <= 40 and max(launch.held for launch in made) <= most
        assert sum(launch.seconds(head_model.H100) for launch in made) <= milliseconds / 1e3
