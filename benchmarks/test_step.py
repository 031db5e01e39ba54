"""One denoising step of a whole model, one picture, no guidance: `pytest benchmarks/test_step.py`.

Plain: the pixel model as its authors write it, same weights. Latent: Z-Image on the latents of a picture of the same
size, (side / 16)^2 tokens, without its autoencoder (for that: test_image.py). Widths are those of the scale, and the
same for both.
"""

from __future__ import annotations

import pytest
import torch

from l2p_fast import flow

from .baselines import (
    LATENT_CHANNELS,
    VAE_FACTOR,
    Judge,
    PlainL2P,
    body_work,
    check_side,
    latent_model,
    latent_work,
    pixel_model,
)
from .conftest import CLOCK
from .measure import Case, Scale, finite
from .test_head import NAMES

pytestmark = pytest.mark.benchmark(timer=CLOCK)
SIGMA, NEXT = 0.5, 0.4


@torch.no_grad()
def build(variant: str, patch: int, scale: Scale, device: str) -> Case:
    side = scale.grid * patch
    cap = torch.randn(scale.text_tokens, scale.cap_dim, device=device, dtype=scale.torch_dtype)
    t = torch.full((1,), 1 - SIGMA, device=device)
    facts = {"width": scale.dim, "layers": scale.layers}
    if variant == "latent":
        model = latent_model(scale, device)
        edge = side // VAE_FACTOR
        state = torch.randn(1, LATENT_CHANNELS, edge, edge, device=device)

        def run_latent() -> torch.Tensor:
            raw = model([state[0, :, None].to(scale.torch_dtype)], t, [cap]).sample[0]
            return flow.euler_step(state, flow.velocity(raw[None, :, 0].float()), SIGMA, NEXT)

        return Case(
            run=run_latent,
            work=latent_work(scale, side),
            check=lambda: finite(run_latent(), tuple(state.shape)),
            against="its shape, and that every number is finite",
            facts=facts | {"tokens": (edge // 2) ** 2},
        )

    model = pixel_model(scale, patch, device)
    plain = PlainL2P(model)
    if variant == "plain compiled":
        plain.compile_parts()
    pixels = torch.randn(1, 3, side, side, device=device)

    def step(call, x: torch.Tensor) -> torch.Tensor:
        return flow.euler_step(x, flow.velocity(call(x).float()), SIGMA, NEXT)

    def run_plain(x: torch.Tensor, plain: PlainL2P = plain) -> torch.Tensor:
        return plain(x, t, cap)

    def ours(side: int):
        cond = model.prepare([cap], side, side, timesteps=t)  # once a picture, not once a step
        return lambda x: model(x, cond=cond, step=0)

    def check() -> float:
        small = torch.randn(1, 3, checked, checked, device=device)
        result = (ours(checked) if variant == "ours" else run_plain)(small)
        return judge(result, run_plain(small), lambda plain: run_plain(small, plain))

    checked, judge = check_side(side, device), Judge(model, device)
    call = ours(side) if variant == "ours" else run_plain
    return Case(
        run=lambda: step(call, pixels),
        work=body_work(scale, patch, side),
        check=check,
        tolerance=judge.tolerance,
        against=f"{judge.against}, at {checked} px",
        facts=facts | {"head_width": scale.head_width, "tokens": scale.grid**2},
    )


@pytest.mark.parametrize("variant", ("ours", "plain", "latent", "plain compiled"))
@pytest.mark.parametrize("patch", NAMES, ids=NAMES.get)
def test_step(row, scale, patch, variant):
    if patch not in scale.patches:
        pytest.skip(f"not part of scale {scale.name}")
    row(build, "step", NAMES[patch], scale.grid * patch, variant, patch=patch)
