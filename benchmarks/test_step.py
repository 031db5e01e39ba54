"""One denoising step of a whole model, one image, no guidance: `pytest benchmarks/test_step.py`.

Plain: the pixel model as its authors write it, same weights. Latent: Z-Image on the latents of an image of the same
size, (side / 16)^2 tokens, without its autoencoder (for that: test_image.py). Widths are those of the scale, and the
same for both. By a graph: ours as a CUDA graph. fp8 and int8: ours with 8-bit weights, their error taken against bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from l2p_fast.quantize import products as lowbit
from l2p_fast.sampling import flow, graphs

if TYPE_CHECKING:
    from l2p_fast.models.zimage import L2PTransformer2DModel

from .baselines import (
    LATENT_CHANNELS,
    LOWBIT_TOLERANCE,
    VAE_FACTOR,
    PlainL2P,
    body_work,
    check_lowbit,
    check_side,
    latent_call,
    latent_model,
    latent_work,
    model_facts,
    pixel_case,
    pixel_model,
    text_features,
)
from .conftest import CLOCK
from .measure import Case, NotHere, Scale, error, finite
from .test_head import NAMES

pytestmark = pytest.mark.benchmark(timer=CLOCK)
SIGMA, NEXT = 0.5, 0.4


def step(raw: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return flow.advance(x, flow.velocity(raw.float()), SIGMA, NEXT)


def prepared(model: L2PTransformer2DModel, cap: torch.Tensor, t: torch.Tensor, side: int):
    """Our model as a function of the image; what doesn't depend on it is computed once an image, not once a step."""
    cond = model.prepare([cap], side, side, timesteps=t)
    return lambda x: model(x, cond=cond, step=0)


def graphed(model: L2PTransformer2DModel, cap: torch.Tensor, t: torch.Tensor, side: int):
    """As `prepared`, by a CUDA graph from the third call on."""
    if why := graphs.obstacle(model, cap.device):
        raise NotHere(f"no CUDA graph: {why}")
    graph = graphs.Graphed(prepared(model, cap, t, side))

    def call(x: torch.Tensor) -> torch.Tensor:
        out = graph(x)
        if graph.obstacle:
            raise NotHere(f"no CUDA graph: {graph.obstacle}")
        return out

    return call


OURS = {"ours": prepared, "ours by a graph": graphed}


@torch.no_grad()
def build(variant: str, patch: int, scale: Scale, device: str) -> Case:
    side, cap, t = scale.grid * patch, text_features(scale, device), torch.full((1,), 1 - SIGMA, device=device)
    if variant == "latent":
        edge = side // VAE_FACTOR
        call = latent_call(latent_model(scale, device), cap)
        state = torch.randn(1, LATENT_CHANNELS, edge, edge, device=device)
        return Case(
            run=lambda: step(call(state, t), state),
            work=latent_work(scale, side),
            check=lambda: finite(call(state, t), tuple(state.shape)),
            against="its shape, and that every number is finite",
            facts=model_facts(scale, (edge // 2) ** 2),
        )

    model = pixel_model(scale, patch, device)
    plain = PlainL2P(model)
    if variant == "plain compiled":
        plain.compile_parts()
    ours = OURS.get(variant)

    def run_plain(x: torch.Tensor, plain: PlainL2P = plain) -> torch.Tensor:
        return plain(x, t, cap)

    def run_ours(x: torch.Tensor) -> torch.Tensor:
        call = ours(model, cap, t, x.shape[-1])
        return [call(x) for _ in range(3 if ours is graphed else 1)][-1]

    pixels = torch.randn(1, 3, side, side, device=device)
    call = ours(model, cap, t, side) if ours else run_plain
    return pixel_case(
        model,
        scale,
        device,
        run=lambda: step(call(pixels), pixels),
        call=run_ours if ours else run_plain,
        run_plain=run_plain,
    )


@torch.no_grad()
def build_lowbit(variant: str, patch: int, scale: Scale, device: str) -> Case:
    """Ours with the 8-bit weights that ``variant`` ends in."""
    name = variant.split()[-1]
    check_lowbit(name, device)
    side, cap, t = scale.grid * patch, text_features(scale, device), torch.full((1,), 1 - SIGMA, device=device)

    def make() -> L2PTransformer2DModel:
        torch.manual_seed(0)
        return pixel_model(scale, patch, device)

    def check() -> float:
        """Against a second model with the same weights, made only now: what was computed before would have left its
        memory with the process."""
        small = torch.randn(1, 3, checked, checked, device=device)
        return error(*(prepared(each, cap, t, checked)(small) for each in (model, make())))

    model, checked = make(), check_side(side, device)
    for block in (*model.modulated_blocks, *model.context_refiner):
        lowbit.quantize_block(block, name, model.of_time)
    pixels = torch.randn(1, 3, side, side, device=device)
    call = prepared(model, cap, t, side)
    return Case(
        run=lambda: step(call(pixels), pixels),
        work=body_work(scale, patch, side),
        check=check,
        tolerance=LOWBIT_TOLERANCE,
        against=f"ours in {scale.dtype}, at {checked} px",
        facts=model_facts(scale, scale.grid**2) | {"head_width": scale.head_width},
    )


@pytest.mark.parametrize("variant", ("ours", "ours by a graph", "plain", "latent", "plain compiled"))
@pytest.mark.parametrize("patch", NAMES, ids=NAMES.get)
def test_step(row, scale, patch, variant):
    if patch not in scale.patches:
        pytest.skip(f"not part of scale {scale.name}")
    row(build, "step", NAMES[patch], scale.grid * patch, variant, patch=patch)


@pytest.mark.parametrize("name", lowbit.DTYPES)
def test_step_lowbit(row, scale, name, patch=64):
    row(build_lowbit, "step", NAMES[patch], scale.grid * patch, f"ours {name}", patch=patch)
