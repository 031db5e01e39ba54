"""The flow: schedule, noising, Euler steps and guidance."""

import pytest
import torch

from l2p_fast.errors import UserError
from l2p_fast.sampling import flow


@pytest.mark.parametrize("steps,shift", [(1, 3.0), (6, 3.0), (30, 3.0), (50, 1.0)])
def test_sigmas(steps, shift):
    s = flow.sigmas(steps, shift)
    assert s.shape == (steps + 1,) and s.dtype == torch.float32
    assert s[0] == 1 and s[-1] == 0 and (s.diff() < 0).all()
    uniform = torch.linspace(1, 0, steps + 1)[:-1]
    torch.testing.assert_close(s[:-1], shift * uniform / (1 + (shift - 1) * uniform))


@pytest.mark.parametrize("steps,shift", [(0, 3.0), (-2, 3.0), (4, 0.0), (4, float("nan"))])
def test_sigmas_refuse(steps, shift):
    with pytest.raises(UserError, match="must be"):
        flow.sigmas(steps, shift)


def test_a_perfect_model_returns_the_picture():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    s = flow.sigmas(5)
    x = flow.add_noise(x0, eps, s[0])
    for now, after in zip(s[:-1], s[1:], strict=True):
        torch.testing.assert_close(x, flow.add_noise(x0, eps, now))
        x = flow.advance(x, flow.velocity(flow.target(x0, eps)), now, after)
    torch.testing.assert_close(x, x0)


def test_noise_per_sample_and_guidance():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 4, 4)
    mixed = flow.add_noise(x0, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed, torch.stack([x0[0], eps[1]]))
    torch.testing.assert_close(flow.guide(x0, eps, 1.0), x0)
    torch.testing.assert_close(flow.guide(x0, eps, 3.0), 3 * x0 - 2 * eps)
