"""`ops.linear`: in float32 where bfloat16 is slow, PyTorch's own elsewhere; what is built on it."""

import pytest
import torch
import torch.nn.functional as F
from tiny_pipeline import tiny_transformer

from l2p_fast.ops import cpu, linear


@pytest.fixture(params=[True, False], ids=["fast bfloat16", "slow bfloat16"])
def fast(request, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_has_fast_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("bias", (True, False))
def test_linear_and_its_gradients(fast, dtype, bias):
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 24), (16, 24), *([(16,)] if bias else [])]
    given = [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]
    out, grad = linear(*given), torch.randn(2, 5, 16, generator=random).to(dtype)
    assert out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = F.linear(*exact)
    limit = {torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]  # one rounding of bf16
    for ours, theirs in zip((out, *torch.autograd.grad(out, given, grad)),
                            (wanted, *torch.autograd.grad(wanted, exact, grad.double())), strict=True):  # fmt: skip
        assert ours.dtype == dtype and (ours.double() - theirs).norm() <= limit * theirs.norm()


def test_frozen_inputs_and_weights(fast):
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    linear(x, weight).float().sum().backward()
    assert x.grad is None and weight.grad.shape == weight.shape
    x.requires_grad_()
    linear(x, weight.detach()).float().sum().backward()
    assert x.grad.shape == x.shape


def test_a_model_in_bfloat16_agrees_with_float32(fast):
    model = tiny_transformer()
    random = torch.Generator().manual_seed(0)
    side = 4 * model.size_multiple
    pixels, text = torch.randn(1, 3, side, side, generator=random), torch.randn(5, model.config.cap_feat_dim)
    with torch.no_grad():
        wanted = model(pixels, torch.tensor([0.5]), [text])
        out = model.to(torch.bfloat16)(pixels, torch.tensor([0.5]), [text])
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).norm() < 0.05 * wanted.norm()
