"""The Detailer Head alone, at each checkpoint's own resolution, width 3840 features: `pytest benchmarks/test_head.py`.

Plain: the head as its authors write it. Errors are taken against fp32; where memory is short on a smaller image, in
bands all the same. Smaller sizes as well, and bfloat16 asked for on a CPU that is slow at it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from l2p_fast.models.detailer import DetailerHead
from l2p_fast.ops import product_dtype

from . import counts
from .baselines import PlainHead, check_side, made_on
from .conftest import CLOCK
from .measure import Case, Scale, error

NAMES = {16: "1K", 64: "4K", 128: "8K", 160: "10K"}
VARIANTS = ("ours", "plain", "plain channels-last", "plain compiled")
SMALLER = {16: (512,), 64: (1024, 2048)}  # px
ASKED = "ours in bfloat16"
pytestmark = pytest.mark.benchmark(timer=CLOCK)


@torch.no_grad()
def build(variant: str, patch: int, scale: Scale, device: str, side: int | None = None) -> Case:
    side = side or scale.grid * patch
    if variant == ASKED:
        scale = replace(scale, dtype="bfloat16")
    with made_on(device, scale.torch_dtype):
        head = DetailerHead(patch, scale.wide, scale.head_width).eval()
    if variant == "plain channels-last":
        head.to(memory_format=torch.channels_last)
    plain = PlainHead(head)
    call = head if variant.startswith("ours") else plain
    if variant == "plain compiled":
        call = PlainHead(head)
        call.compile()

    def inputs(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randn(1, (side // patch) ** 2, scale.wide, device=device, dtype=scale.torch_dtype)
        features = tokens.unflatten(1, (side // patch,) * 2).permute(0, 3, 1, 2)  # as the transformer leaves them
        return torch.randn(1, 3, side, side, device=device), features

    pixels, features = inputs(side)
    checked = check_side(side, device)
    plan = head.plan(pixels, features.dtype)

    def check() -> float:
        """Error against fp32, as a multiple of the plain module's own; a smaller size must not switch the bands off."""
        small, small_features = inputs(checked)
        given = {}
        if call is head and plan is not None and checked < side:
            given = {"band_rows": min(plan[1], checked // 2)}
        result = call(small, small_features, **given)
        if variant == ASKED:  # the plain module would take minutes
            return error(result, head.float().forward_reference(small, small_features.float()))
        own = plain(small, small_features)
        if scale.dtype == "float32":
            return error(result, own)
        exact = head.float().forward_reference(small, small_features.float())
        head.to(scale.torch_dtype)
        return error(result, exact) / error(own, exact)

    if variant == ASKED:
        against, tolerance = "fp32", 0.02
    else:
        tolerance = 1e-5 if scale.dtype == "float32" else 2.0
        against = "the plain module" if scale.dtype == "float32" else "fp32, in units of the plain module's own error"
    return Case(
        run=lambda: call(pixels, features),
        work=counts.head(head.levels, head.bottleneck[0].out_channels, scale.wide, side, side, patch),
        check=check,
        tolerance=tolerance,
        against=f"{against}, at {checked} px",
        facts={"width": scale.wide, "head_width": scale.head_width, "bands": plan if call is head else None},
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patch", NAMES, ids=NAMES.get)
def test_head(row, scale, patch, variant):
    row(build, "head", NAMES[patch], scale.grid * patch, variant, patch=patch)


@pytest.mark.parametrize("variant", ("ours", ASKED, "plain", "plain channels-last"))
@pytest.mark.parametrize("patch,side", [(patch, side) for patch, sides in SMALLER.items() for side in sides])
def test_head_smaller(row, scale, patch, side, variant):
    if scale.name == "quick" or row.device != "cpu":
        pytest.skip("sizes for a CPU, at full width")
    if variant == ASKED and product_dtype(torch.bfloat16, torch.device(row.device)) == torch.bfloat16:
        pytest.skip("bfloat16 is fast here, and what the other rows are in")
    row(build, "head", f"{NAMES[patch]} at {side} px", side, variant, patch=patch, side=side)
