"""Bias, SiLU and pool in one pass: the kernel is the reference, and the reference is PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from l2p_fast.ops import activate, activate_reference


@pytest.mark.parametrize("kinds", (1, 9))
@pytest.mark.parametrize("shape", ((1, 2, 2, 8), (2, 4, 6, 16), (1, 6, 10, 3), (1, 8, 34, 24)))
def test_activate(shape, kinds):
    torch.manual_seed(0)
    x, other = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    bias = torch.randn(kinds, shape[3])
    for second in (None, other):
        for keep, pool in ((True, True), (True, False), (False, True)):
            got = activate(x, second, bias, keep=keep, pool=pool)
            for out, wanted in zip(got, activate_reference(x, second, bias, keep, pool), strict=True):
                assert out.shape == wanted.shape and out.is_contiguous()
                torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-5)


def test_views_and_what_is_not_a_number():
    x, other = torch.randn(1, 24, 4, 6).bfloat16().permute(0, 2, 3, 1), torch.randn(1, 4, 6, 32).bfloat16()[..., 5:29]
    other[0, 1, 3, 2] = float("nan")
    for out, wanted in zip(
        activate(x, other, torch.zeros(1, 24), pool=True),
        activate_reference(x, other, torch.zeros(1, 24), pool=True),
        strict=True,
    ):
        torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-5, equal_nan=True)


def test_bias_by_place():
    x, bias = torch.zeros(1, 3, 4, 1, dtype=torch.float64), torch.arange(9.0)[:, None]
    out, _ = activate_reference(x, None, bias)
    wanted = torch.tensor([[0, 1, 1, 2], [3, 4, 4, 5], [6, 7, 7, 8]], dtype=torch.float64)
    assert torch.equal(out[0, ..., 0], F.silu(wanted))


def test_opcheck():
    x = torch.randn(1, 2, 4, 8).bfloat16()
    opcheck(
        torch.ops.l2p_fast.activate,
        (x, x.clone(), torch.randn(9, 8), True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_nothing():
    out, pooled = activate(torch.empty(0, 2, 2, 8).bfloat16(), None, torch.zeros(1, 8), pool=True)
    assert out.shape == (0, 2, 2, 8) and pooled.shape == (0, 1, 1, 8)
