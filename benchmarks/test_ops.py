"""Single operations against their plain form, at 4096 px or 4096 tokens of width 3840: `pytest benchmarks/test_ops.py`.

Every call allocates its result, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from l2p_fast import ops

from . import baselines, counts
from .conftest import CLOCK
from .measure import Case, Scale, error

pytestmark = pytest.mark.benchmark(timer=CLOCK)
EPS = 1e-5
Op = tuple[Callable, Callable, counts.Work, float]  # ours, plain, work, tolerance


def patchify(scale: Scale, make: Callable, patch: int = 64) -> Op:
    side, dtype = scale.grid * 64, scale.torch_dtype
    pixels = make(1, 3, side, side, dtype=torch.float32)
    return (
        lambda: ops.patchify(pixels, patch, dtype),
        lambda: baselines.patchify(pixels, patch, dtype),
        counts.moved(pixels.shape, size=4) + counts.moved(pixels.shape),
        0.0,
    )


def unpatchify(scale: Scale, make: Callable, patch: int = 64) -> Op:
    side = scale.grid * 64
    tokens = make(1, (side // patch) ** 2, 3 * patch * patch)
    return (
        lambda: ops.unpatchify(tokens, patch, side, side, torch.float32),
        lambda: baselines.unpatchify(tokens, patch, side, side, torch.float32),
        counts.moved(tokens.shape, size=4) + counts.moved(tokens.shape),
        0.0,
    )


def update(scale: Scale, make: Callable) -> Op:
    """Both halves of guidance and the Euler step: the sampler's share of a step."""
    side = scale.grid * 64
    x, raw = make(1, 3, side, side, dtype=torch.float32), make(2, 3, side, side)

    def ours() -> torch.Tensor:
        return ops.euler_step(x, raw[:1], 0.4 - 0.5, raw[1:], 4.0)

    def plain() -> torch.Tensor:
        v = -raw.float()
        return x + (v[1:] + 4.0 * (v[:1] - v[1:])) * (0.4 - 0.5)

    return ours, plain, counts.moved(x.shape, x.shape, size=4) + counts.moved(raw.shape), 1e-5


def norm_modulate(scale: Scale, make: Callable) -> Op:
    x, weight, factor = make(1, scale.grid**2, scale.wide), make(scale.wide), make(1, 1, scale.wide)
    return (
        lambda: ops.norm_modulate(x, weight, factor, EPS),
        lambda: baselines.rms_norm(x, weight, EPS) * (1 + factor),
        counts.moved(x.shape, x.shape),
        0.01,
    )


def norm_modulate_quantize(scale: Scale, make: Callable) -> Op:
    """What layers of 8 bits read: the same, rounded row by row."""
    x, weight, factor = make(1, scale.grid**2, scale.wide), make(scale.wide), make(1, 1, scale.wide)
    return (
        lambda: ops.norm_modulate_quantize(x, weight, factor, EPS, torch.int8).values,
        lambda: ops.quantize_rows(baselines.rms_norm(x, weight, EPS) * (1 + factor), torch.int8).values,
        counts.moved(x.shape) + counts.moved(x.shape, size=1),
        0.02,
    )


def gate_norm_residual(scale: Scale, make: Callable) -> Op:
    shape = 1, scale.grid**2, scale.wide
    residual, x, weight, gate = make(*shape), make(*shape), make(scale.wide), make(1, 1, scale.wide)
    return (
        lambda: ops.gate_norm_residual(residual, x, weight, gate, EPS),
        lambda: residual + gate.tanh() * baselines.rms_norm(x, weight, EPS),
        counts.moved(shape, shape, shape),
        0.01,
    )


def qk_norm_rope(scale: Scale, make: Callable) -> Op:
    heads = scale.heads(scale.wide)
    shape = 1, scale.grid**2, heads, scale.wide // heads
    x, weight = make(*shape), make(shape[-1])
    angles = make(1, shape[1], 1, shape[-1] // 2, dtype=torch.float32)
    table = angles.cos(), angles.sin()
    turns = torch.complex(*table)[:, :, 0]
    return (
        lambda: ops.qk_norm_rope(x, weight, table, EPS),
        lambda: baselines.rope(baselines.rms_norm(x, weight, EPS), turns),
        counts.moved(shape, shape) + counts.moved(angles.shape, angles.shape, size=4),
        0.01,
    )


def silu_mul(scale: Scale, make: Callable) -> Op:
    shape = 1, scale.grid**2, int(scale.wide / 3 * 8)
    x, y = make(*shape), make(*shape)
    return (
        lambda: ops.silu_mul(x, y),
        lambda: baselines.silu_mul(x, y),
        counts.moved(shape, shape, shape),
        0.01,
    )


OPS = {
    "patchify 64": (patchify, {}),
    "patchify 16": (patchify, {"patch": 16}),
    "unpatchify 64": (unpatchify, {}),
    "guidance + Euler step": (update, {}),
    "RMSNorm x (1 + scale)": (norm_modulate, {}),
    "RMSNorm x (1 + scale) to int8": (norm_modulate_quantize, {}),
    "residual + gate x RMSNorm": (gate_norm_residual, {}),
    "qk-RMSNorm + RoPE": (qk_norm_rope, {}),
    "SiLU x mul": (silu_mul, {}),
}


@torch.no_grad()
def build(variant: str, op: str, scale: Scale, device: str) -> Case:
    def make(*shape: int, dtype: torch.dtype = scale.torch_dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    function, options = OPS[op]
    ours, plain, work, tolerance = function(scale, make, **options)
    run = {"ours": ours, "plain": plain}.get(variant) or torch.compile(plain)
    return Case(
        run=run,
        work=work,
        check=lambda: error(run(), plain()),
        tolerance=tolerance,
        against="the plain form in the same dtype",
        facts={"width": scale.wide},
    )


@pytest.mark.parametrize("variant", ("ours", "plain", "plain compiled"))
@pytest.mark.parametrize("op", OPS)
def test_op(row, scale, op, variant):
    row(build, "op", op, scale.grid * 64, variant, op=op)
