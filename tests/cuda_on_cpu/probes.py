"""The emulator itself: what the probe kernels compute is right, and launches that no GPU takes are refused."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

LIBRARY = ctypes.CDLL(os.environ["L2P_CUDA_ON_CPU"])


def call(name: str, *arguments: torch.Tensor | int) -> None:
    function = getattr(LIBRARY, name)
    function.restype = ctypes.c_char_p
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments]
    if error := function(*given):
        raise RuntimeError(error.decode())


@pytest.mark.parametrize("rows", (1, 64, 150))
def test_product_of_tiles_copied_in_the_background(rows):
    a, b = torch.randn(rows, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    out = torch.full((rows, 8), torch.nan)
    call("probe_product", a, b, out, rows)
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", (1, 32, 1000))
def test_votes_and_shuffles(count):
    values = torch.randn(count)
    counts = torch.full(((count + 31) // 32,), -1, dtype=torch.int32)
    call("probe_count", values, counts, count)
    assert counts.tolist() == [(part > 0).sum().item() for part in values.split(32)]


def test_indices_are_divided_in_32_bits_and_larger_ones_refused():
    random = torch.Generator().manual_seed(0)
    values = torch.randint(2**32, (64,), generator=random)
    by = torch.randint(1, 2**32, (64,), generator=random) >> torch.arange(64) % 32
    values[:4], by[:4] = torch.tensor([2**32 - 1, 2**32 - 1, 2**31, 0]), torch.tensor([1, 2**32 - 1, 3, 7])
    by.clamp_(min=1)
    quotients, remainders = torch.zeros_like(values), torch.zeros_like(values)
    call("probe_divide", values, by, quotients, remainders, 64)
    assert torch.equal(quotients, values // by) and torch.equal(remainders, values % by)
    call("probe_divide", values + 2**32, by, quotients, remainders, 64)
    assert torch.equal(quotients, values // by)  # what lies above 32 bits is not looked at, so:
    call("probe_too_many", torch.tensor([2**32 - 1]))
    with pytest.raises(RuntimeError, match="more than 2\\^32 elements"):
        call("probe_too_many", torch.tensor([2**32]))


def test_launches_that_no_gpu_takes_are_refused():
    values, counts = torch.randn(1025), torch.zeros(33, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="threads of a block: 1056, at most 1024"):
        call("probe_count", values, counts, 1025)
    with pytest.raises(RuntimeError, match="no threads"):
        call("probe_count", values, counts, 0)
    call("probe_count", values, counts, 1024)  # and the next is none the worse
