"""One image from noise to bytes, few steps, no guidance, text features given: `pytest benchmarks/test_image.py`.

Plain: the same loop over the plain pixel model. Latent: the same loop over latents, then the autoencoder's decoder,
whole or in diffusers' own tiles. Noise is drawn on the CPU by all.
"""

from __future__ import annotations

import pytest
import torch

from l2p_fast.sampling import flow
from l2p_fast.sampling.pixels import draw_noise, pixels_to_images
from l2p_fast.sampling.request import Request

from . import counts
from .baselines import (
    LATENT_CHANNELS,
    VAE_FACTOR,
    PlainL2P,
    autoencoder,
    latent_call,
    latent_model,
    latent_work,
    model_facts,
    pixel_case,
    pixel_model,
    text_features,
)
from .conftest import CLOCK
from .measure import Case, Scale, finite
from .test_head import NAMES

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def euler(call, noise: torch.Tensor, sigmas: torch.Tensor, device: str) -> torch.Tensor:
    """The plain loop: ``call(state, t)`` is the raw output."""
    x = noise.to(device)
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = torch.full((1,), 1 - sigma, device=device)
        x = flow.advance(x, flow.velocity(call(x, t).float()), sigma, following)
    return x


@torch.no_grad()
def build(variant: str, patch: int, scale: Scale, device: str) -> Case:
    side, steps, cap = scale.grid * patch, scale.image_steps, text_features(scale, device)
    sigmas = flow.sigmas(steps)
    if variant.startswith("latent"):
        call = latent_call(latent_model(scale, device), cap)
        vae = autoencoder(scale, device, tiled=variant == "latent tiled")
        edge = side // VAE_FACTOR

        def draw_latent() -> list:
            x = euler(call, draw_noise((1, LATENT_CHANNELS, edge, edge)), sigmas, device)
            latents = (x / vae.config.scaling_factor + vae.config.shift_factor).to(scale.torch_dtype)
            return pixels_to_images(vae.decode(latents).sample.float(), "pil")

        def check_decoder() -> float:
            small = torch.randn(1, LATENT_CHANNELS, 16, 16, device=device, dtype=scale.torch_dtype)
            return finite(vae.decode(small).sample, (1, 3, 16 * VAE_FACTOR, 16 * VAE_FACTOR))

        return Case(
            run=draw_latent,
            work=latent_work(scale, side) * steps + counts.vae_decode(scale.vae_channels, LATENT_CHANNELS, edge, edge),
            check=check_decoder,
            against="shape and finite numbers of a small decode",
            facts=model_facts(scale, (edge // 2) ** 2) | {"vae_channels": scale.vae_channels, "steps": steps},
        )

    from l2p_fast.sampling.pipeline import L2PPipeline, make_scheduler
    from l2p_fast.sampling.session import Session

    model = pixel_model(scale, patch, device)
    plain = PlainL2P(model)
    if variant == "plain compiled":
        plain.compile_parts()
    pipe = L2PPipeline(model, None, None, make_scheduler())
    pipe.set_progress_bar_config(disable=True)

    def run_ours(noise: torch.Tensor | None, side: int, kind: str):
        given = {"height": side, "width": side, "num_inference_steps": steps, "guidance_scale": 1.0}
        return pipe(prompt_embeds=[cap], noise=noise, output_type=kind, **given).images

    def run_plain(noise: torch.Tensor | None, side: int, kind: str, plain: PlainL2P = plain):
        noise = draw_noise((1, 3, side, side)) if noise is None else noise
        return pixels_to_images(euler(lambda x, t: plain(x, t, cap), noise, sigmas, device), kind)

    session = Session(pipe, texts=lambda prompts: [cap for _ in prompts])
    request = Request("", seed=0, height=side, width=side, steps=steps, guidance=1.0)
    draw = run_ours if variant == "ours" else run_plain
    return pixel_case(
        model,
        scale,
        device,
        run=(lambda: session.draw(request)) if variant == "ours" else lambda: run_plain(None, side, "pil"),
        call=lambda noise: draw(noise, noise.shape[-1], "latent"),
        run_plain=lambda noise, plain: run_plain(noise, noise.shape[-1], "latent", plain),
        steps=steps,
    )


@pytest.mark.parametrize("variant", ("ours", "plain", "latent", "latent tiled", "plain compiled"))
@pytest.mark.parametrize("patch", NAMES, ids=NAMES.get)
def test_image(row, scale, patch, variant):
    if patch not in scale.patches:
        pytest.skip(f"not part of scale {scale.name}")
    row(build, "image", NAMES[patch], scale.grid * patch, variant, patch=patch)
