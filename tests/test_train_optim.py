"""The optimizer: against PyTorch's and bitsandbytes', rounding of bf16 weights, updates inside the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast.training import optim
from l2p_fast.training.config import EMAConfig, OptimConfig
from l2p_fast.training.ema import EMA
from l2p_fast.training.optim import AdamW, has_8bit_state, state_bytes, stochastic_round_

SHAPES = {"vector": (300,), "matrix": (24, 512), "odd": (31, 200), "conv": (20, 24, 3, 3), "small": (2, 8)}


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")


def weights(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def train(named, optimizers, steps, scale=1.0):
    """The same gradients for every set of weights."""
    for step in range(steps):
        torch.manual_seed(step)
        gradients = {name: scale * torch.randn(shape) for name, shape in SHAPES.items()}
        for parameters, optimizer in zip(named, optimizers, strict=True):
            for name, p in parameters.items():
                p.grad = gradients[name].to(p.dtype)
            optimizer.step()


def test_plain_adamw_is_pytorchs():
    ours, theirs = weights(), weights()
    config = OptimConfig("adamw", lr=1e-2, betas=[0.9, 0.95], weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    train([ours, theirs], [AdamW(ours, config), reference], 12)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_8bit_is_bitsandbytes_where_rows_are_whole_blocks(bitsandbytes):
    ours, theirs = weights(), weights()
    reference = bitsandbytes.optim.AdamW8bit([theirs["matrix"]], lr=1e-2, weight_decay=0.1)
    optimizer = AdamW(ours, OptimConfig("adamw8bit", lr=1e-2, weight_decay=0.1))
    train([ours, theirs], [optimizer, reference], 6)
    assert torch.equal(ours["matrix"], theirs["matrix"])


@pytest.mark.slow
def test_torchaos_kernel_on_the_same_states(bitsandbytes):
    pytest.importorskip("torchao", reason="pip install l2p_fast[torchao]")
    ours, theirs = weights(), weights()
    optimizers = [AdamW(w, OptimConfig(kind, lr=1e-2)) for w, kind in ((ours, "adamw8bit"), (theirs, "torchao"))]
    start = weights()
    train([ours, theirs], optimizers, 5)
    for name in SHAPES:
        assert (ours[name] - theirs[name]).norm() < 0.02 * (ours[name] - start[name]).norm(), name
        for key, value in optimizers[1].state[name].items():
            assert value.dtype == optimizers[0].state[name][key].dtype and value.any()


def test_8bit_stays_near_32_bit(bitsandbytes):
    ours, theirs = weights(), weights()
    eight, plain = (AdamW(w, OptimConfig(kind, lr=1e-2)) for w, kind in ((ours, "adamw8bit"), (theirs, "adamw")))
    start = weights()
    train([ours, theirs], [eight, plain], 20)
    for name in SHAPES:
        moved = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.1 * moved, name


def test_which_tensors_have_8_bits_follows_from_the_global_shape(bitsandbytes):
    assert [name for name, shape in SHAPES.items() if has_8bit_state(shape)] == ["matrix", "odd", "conv"]
    optimizer = AdamW(weights(), OptimConfig("adamw8bit"))
    for name, shape in SHAPES.items():
        held = sum(value.nbytes for value in optimizer.state[name].values())
        assert held == state_bytes(shape, optimizer.config, 4)
        assert ("m_scale" in optimizer.state[name]) == has_8bit_state(shape)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_large_tensors_are_updated_in_pieces(bitsandbytes, monkeypatch, kind):
    whole, pieces = weights(), weights()
    optimizers = [AdamW(w, OptimConfig(kind, lr=1e-2)) for w in (whole, pieces)]
    train([whole], optimizers[:1], 3)
    monkeypatch.setattr(optim, "CHUNK", 1500)
    train([pieces], optimizers[1:], 3)
    assert all(torch.equal(whole[name], pieces[name]) for name in SHAPES)


def test_stochastic_rounding_keeps_the_mean():
    values = torch.full((200_000,), 1.0 + 2**-8 * 0.3)  # 0.6 of the way between two bf16 values
    out = torch.empty_like(values, dtype=torch.bfloat16)
    stochastic_round_(out, values, torch.Generator().manual_seed(0))
    assert set(out.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(out.float().mean() - values.mean()) < 3e-5
    exact = torch.tensor([-1.5, 0.0, 3.0])
    stochastic_round_(out[:3], exact, torch.Generator().manual_seed(0))
    assert torch.equal(out[:3].float(), exact)


def distance_fitted(dtype, rounding, kind="adamw", steps=400):
    """Fit a linear map at the published lr; returns (loss at the end, how far the weights moved)."""
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    weight = nn.Parameter((torch.randn(32, 256) / 16).to(dtype))
    start = weight.detach().float().clone()
    goal = x @ (start + 0.02 * torch.randn(32, 256)).T
    optimizer = AdamW({"w": weight}, OptimConfig(kind, lr=5e-5, weight_decay=0.0, rounding=rounding))
    for _ in range(steps):
        loss = (x.to(dtype) @ weight.T - goal.to(dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (x @ weight.float().T - goal).square().mean().item(), (weight.float() - start).abs().mean().item()


def test_bf16_stalls_where_ours_follows_fp32(bitsandbytes):
    """At lr 5e-5 plain bf16 stops far above fp32; stochastic rounding and masters, 8-bit states too, go with it."""
    loss, moved = distance_fitted(torch.float32, "nearest")
    stalled_loss, stalled = distance_fitted(torch.bfloat16, "nearest")
    assert stalled_loss > 2.5 * loss and stalled < 0.6 * moved
    for rounding, kind in (("stochastic", "adamw"), ("masters", "adamw"), ("stochastic", "adamw8bit")):
        ours_loss, ours = distance_fitted(torch.bfloat16, rounding, kind)
        assert ours_loss < 1.25 * loss + 1e-3, (rounding, kind)
        assert 0.85 * moved < ours < 1.2 * moved, (rounding, kind)


def test_same_seed_same_rounding():
    results = []
    for _ in range(2):
        named = weights(torch.bfloat16)
        train([named], [AdamW(named, OptimConfig("adamw", lr=1e-4), seed=5)], 3)
        results.append(named)
    assert all(torch.equal(results[0][name], results[1][name]) for name in SHAPES)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_fused_updates_are_the_same_and_leave_no_gradients(bitsandbytes, kind):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 200))

    plain, fused = model(), model()
    optimizers = [AdamW(dict(m.named_parameters()), OptimConfig(kind, lr=1e-3)) for m in (plain, fused)]
    optimizers[1].fuse()
    alive = []
    fused[0].register_full_backward_hook(lambda *_: alive.append([p.grad for p in fused[2].parameters()]))
    for step in range(3):
        x = torch.randn(8, 200, generator=torch.Generator().manual_seed(step))
        for m in (plain, fused):
            (m(x) - x).square().mean().backward()
        wanted = optimizers[0].squared_norm()
        optimizers[0].step()
        squared, left_alone = optimizers[1].finish()
        assert squared == pytest.approx(wanted, rel=1e-5) and left_alone == 0
    assert all(g is None for grads in alive for g in grads) and all(p.grad is None for p in fused.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fused.parameters(), strict=True))


def test_fused_leaves_alone_what_is_not_finite_and_the_rest_of_the_step():
    named = {name: nn.Parameter(torch.ones(4)) for name in ("a", "b", "c")}
    optimizer = AdamW(named, OptimConfig("adamw", lr=0.1))
    optimizer.fuse()
    for name, factor in (("a", 1.0), ("b", float("inf")), ("c", 1.0)):
        (named[name].sum() * factor).backward()
    assert optimizer.finish()[1] == 2
    assert [torch.equal(p, torch.ones(4)) for p in named.values()] == [False, True, True]
    named["c"].sum().backward()
    assert optimizer.finish()[1] == 0 and not torch.equal(named["c"], torch.ones(4))


def test_offloaded_states_are_the_same():
    here, away = weights(torch.bfloat16), weights(torch.bfloat16)
    configs = [OptimConfig("adamw", lr=1e-3, rounding="masters", offload=offload) for offload in (False, True)]
    train([here, away], [AdamW(w, c) for w, c in zip((here, away), configs, strict=True)], 3)
    assert all(torch.equal(here[name], away[name]) for name in SHAPES)


def test_clip_scales_to_the_norm():
    named = weights()
    optimizer = AdamW(named, OptimConfig("adamw"))
    for p in named.values():
        p.grad = torch.ones_like(p)
    norm = optimizer.squared_norm() ** 0.5
    optimizer.clip(norm, 2 * norm)
    assert optimizer.squared_norm() ** 0.5 == pytest.approx(norm)
    optimizer.clip(norm, 1.0)
    assert optimizer.squared_norm() ** 0.5 == pytest.approx(1.0, rel=1e-5)


def test_average_follows_the_weights():
    named = {"w": nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))}
    average = EMA(named, EMAConfig(decay=0.9))
    for step in range(1, 200):
        named["w"].data.fill_(1.0)
        average.update(step)
    assert average.average["w"].dtype == torch.float32
    torch.testing.assert_close(average.average["w"], torch.ones(3), rtol=1e-4, atol=1e-4)
    assert EMA(named, EMAConfig()).tensors() == {}
