"""No CUDA kernel is worse than `kernel_report.csv` says, and none is bad."""

from __future__ import annotations

import re

import pytest

from l2p_fast import ops
from tests import kernel_report
from tests.kernel_report import Row

# Of CUTLASS 4.2's product of bfloat16 matrices, 128 x 128 x 64 a block and 64 x 64 x 64 a warp, by mma for sm_80 and
# compiled by nvcc 13.0 for sm_90a: 300 instructions of its loop, which copies, too, for 128 on tensor cores. Of its
# convolution (optimized iterators, 128 x 128 x 32) these are 200 for 64.
INNER = 234
# Kernels that take whole vectors, which every layout but odd ones lets them.
WIDE = re.compile(
    r"dense_kernel|(?<!any_)image_kernel|step_kernel<\w+, 8>|silu_cuda|norm_cuda.*, true|activate_kernel<8|head_kernel"
)


def test_no_kernel_is_worse_than_in_the_table():
    if problem := kernel_report.obstacle():
        pytest.skip(problem)
    made_by, before = kernel_report.recorded()
    now = kernel_report.read(ops._PACKAGE / "_C.abi3.so")
    assert not kernel_report.differences(now, before, made_by == kernel_report.compiler())


def test_the_table_has_no_bad_kernel():
    _, rows = kernel_report.recorded()
    assert len(rows) > 100 and any(row.tensor for row in rows.values())
    for (name, where), row in rows.items():
        # divisions and roots of doubles are calls, which put registers aside
        assert row.spills == 0 or (row.spills <= 8 and "double" in name), (name, where)
        assert not WIDE.search(name) or (row.load >= 128 and row.store >= 128), (name, where, row)
        assert "head_kernel" not in name or (row.tensor > 0 and row.inner <= 1.5 * INNER), (name, where, row)


def test_instructions_for_a_product():
    assert kernel_report.per_product([7]) == 100
    assert kernel_report.per_product([0, 2, 4, 100, 101, 103, 106, 400]) == 175


def test_differences(tmp_path, monkeypatch):
    good = Row(registers=40, stack=0, spills=0, shared=512, inner=140, load=128, store=128, tensor=4)
    name = "some.cu kernel<float>"
    before = {(name, where): good for where in kernel_report.ARCHITECTURES}
    monkeypatch.setattr(kernel_report, "compiler", lambda: "nvcc 1.0")
    kernel_report.write(before | {(name, "sm_80"): good._replace(registers=38)}, tmp_path / "table.csv")
    assert kernel_report.recorded(tmp_path / "table.csv") == (
        "nvcc 1.0",
        before | {(name, "sm_80"): good._replace(registers=38)},
    )
    for change, same, other in (
        (dict(registers=41), True, False),
        (dict(registers=32, tensor=2), False, False),
        (dict(inner=141), True, False),
        (dict(spills=1), True, True),
        (dict(store=32), True, True),
        (dict(tensor=0), True, True),
    ):
        now = before | {(name, "sm_100"): good._replace(**change)}
        assert bool(kernel_report.differences(now, before, same=True)) == same, change
        assert bool(kernel_report.differences(now, before, same=False)) == other, change
    assert kernel_report.differences({}, before, same=True) == [f"{name}: in kernel_report.csv alone"]
