"""One modulated transformer block on 4096 image tokens and text, at full width: `pytest benchmarks/test_block.py`.

Plain: diffusers' Z-Image block with the same weights. fp8 and int8: ours with 8-bit weights, against that.
"""

from __future__ import annotations

import pytest
import torch

from l2p_fast.quantize import products as lowbit

from . import counts
from .baselines import LOWBIT_TOLERANCE, check_lowbit, made_on
from .conftest import CLOCK
from .measure import Case, Scale, error

pytestmark = pytest.mark.benchmark(timer=CLOCK)


@torch.no_grad()
def build(variant: str, scale: Scale, device: str) -> Case:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

    from l2p_fast.models.blocks import TransformerBlock, rope_tables

    bits = next((name for name in lowbit.DTYPES if variant.endswith(name)), None)
    if bits:
        check_lowbit(bits, device)
    dim, heads = scale.wide, scale.heads(scale.wide)
    tokens = counts.padded(scale.grid**2) + scale.text_tokens
    with made_on(device, scale.torch_dtype):
        ours = TransformerBlock(dim, heads, norm_eps=1e-5, qk_norm=True).eval()
        plain = ZImageTransformerBlock(0, dim, heads, heads, norm_eps=1e-5, qk_norm=True).eval()
        x, temb = torch.randn(1, tokens, dim), torch.randn(1, min(dim, counts.TIME_WIDTH))
    plain.load_state_dict(ours.state_dict(), assign=True)
    if variant == "plain compiled":
        plain.compile()
    if bits:
        lowbit.quantize_block(ours, bits, ("modulation",))
    width = dim // heads
    positions = torch.arange(tokens)[:, None].expand(-1, 3)
    cos, sin = rope_tables(positions.double()[None], (width // 4, width // 8 * 3, width // 8 * 3), 256.0)
    rope = cos.to(device), sin.to(device)
    turns = torch.complex(*rope)[:, :, 0]

    def run_plain() -> torch.Tensor:
        return plain(x, None, turns, temb)

    def run_ours() -> torch.Tensor:
        return ours(x, rope, temb=temb)

    run = run_ours if variant.startswith("ours") else run_plain
    return Case(
        run=run,
        work=counts.block(tokens, dim),
        check=lambda: error(run(), run_plain()),
        tolerance=LOWBIT_TOLERANCE if bits else 0.02,
        against=f"the plain block in {scale.dtype}",
        facts={"width": dim, "heads": heads, "tokens": tokens},
    )


@pytest.mark.parametrize("variant", ("ours", "plain", "plain compiled"))
def test_block(row, scale, variant):
    row(build, "block", f"{scale.grid**2}+{scale.text_tokens} tokens", scale.grid * 16, variant)


@pytest.mark.parametrize("name", lowbit.DTYPES)
def test_block_lowbit(row, scale, name):
    test_block(row, scale, f"ours {name}")
