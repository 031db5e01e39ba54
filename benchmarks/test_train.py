"""One training step, batch 1: forward, backward, AdamW; every block recomputed in the backward pass.

The blocks between the first and the last few are frozen, as published. Plain: the pixel model as its authors write it.
Latent: Z-Image on latents of the same image size, trained the same way. Ours in 8 bits: as configs/24gb.yaml, frozen
blocks and optimizer states in 8 bits, updates inside the backward pass. ``pytest benchmarks/test_train.py``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from l2p_fast.quantize.frozen import quantize_frozen
from l2p_fast.sampling import flow

from . import counts

if TYPE_CHECKING:
    from l2p_fast.models.zimage import L2PTransformer2DModel

from .baselines import (
    LATENT_CHANNELS,
    VAE_FACTOR,
    PlainL2P,
    body_work,
    check_side,
    freeze,
    latent_call,
    latent_model,
    latent_work,
    pixel_model,
    text_features,
)
from .conftest import CLOCK
from .measure import Case, Scale, error
from .test_head import NAMES

pytestmark = pytest.mark.benchmark(timer=CLOCK)
ADAMW_BYTES = 14  # bf16 weight, gradient and two states read, all but the gradient written
FEW_BITS = "ours in 8 bits"
RATE = 0.0  # the work of an update without its effect: the gradient can be checked after any number of steps


def build(variant: str, patch: int, scale: Scale, device: str) -> Case:
    from l2p_fast.training import optim
    from l2p_fast.training.config import OptimConfig

    side, sigma = scale.grid * patch, 0.5
    cap = text_features(scale, device)
    t = torch.full((1,), 1 - sigma, device=device)
    latent = variant == "latent"
    edge = side // VAE_FACTOR
    shape = (1, LATENT_CHANNELS, edge, edge) if latent else (1, 3, side, side)

    def make() -> L2PTransformer2DModel:
        torch.manual_seed(0)
        return pixel_model(scale, patch, device)

    if latent:
        trained = latent_model(scale, device)
        trained.enable_gradient_checkpointing()
        call, work = functools.partial(latent_call(trained, cap), t=t), latent_work(scale, side)
    else:
        model = make()
        model.enable_gradient_checkpointing()
        plain = PlainL2P(model)
        plain.checkpointing = True
        trained = plain if variant == "plain" else model
        call = (lambda x: plain(x, t, cap)) if variant == "plain" else (lambda x: model(x, t, [cap]))
        work = body_work(scale, patch, side)
    parameters = freeze(trained, scale)
    if variant == FEW_BITS:
        for name, block in model.blocks():
            quantize_frozen(block, 8, lambda _, parameter: parameter, f"{name}.")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = optim.AdamW(named, OptimConfig(kind="adamw8bit", lr=RATE, fused=True))
        optimizer.fuse()
        update = optimizer.finish
    else:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    x0, noise = torch.rand(shape, device=device) * 2 - 1, torch.randn(shape, device=device)

    def loss(call, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        raw = call(flow.add_noise(x0, noise, sigma))
        return F.mse_loss(raw.float(), flow.target(x0, noise))

    def run() -> torch.Tensor:
        value = loss(call, x0, noise)
        value.backward()
        update()
        return value.detach()

    def check() -> float:
        """The gradient of the input embedding, which the whole model lies behind."""
        if latent:
            return 0.0 if run().isfinite() else float("inf")
        gradients: list[torch.Tensor] = []
        small = [torch.rand(1, 3, checked, checked, device=device) for _ in range(2)]

        def note(owner: torch.nn.Module, forward) -> None:
            weight = getattr(owner, "body", owner).get_parameter(f"all_x_embedder.{patch}-1.weight")
            handle = weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
            loss(forward, *small).backward()
            handle.remove()
            owner.zero_grad(set_to_none=True)

        note(trained, call)
        if variant == FEW_BITS:
            trained.to("cpu")  # a card that is made for 8 bits may not hold both
            reference = PlainL2P(make())  # its weights are as they were
        else:
            reference = plain
        reference.checkpointing = True
        freeze(reference, scale)
        note(reference, lambda x: reference(x, t, cap))
        if variant == FEW_BITS:
            del reference
            trained.to(device)
        return error(*gradients)

    checked = check_side(side, device)
    frozen = scale.layers - 2 * scale.free_layers
    tokens = counts.padded((edge // 2) ** 2 if latent else scale.grid**2) + counts.padded(scale.text_tokens)
    linear_flops = counts.block_flops(tokens, scale.dim) - counts.attention(tokens, scale.dim)
    count = sum(p.numel() for p in parameters)
    return Case(
        run=run,
        work=counts.training(work, frozen * linear_flops, count, ADAMW_BYTES),
        check=check,
        tolerance=0.2,
        against="a finite loss" if latent else f"the plain model's gradient in the same dtype, at {checked} px",
        facts={"width": scale.dim, "layers": scale.layers, "trained_parameters": count},
        grad=True,
    )


@pytest.mark.parametrize("variant", ("ours", FEW_BITS, "plain", "latent"))
@pytest.mark.parametrize("patch", (16, 64), ids=NAMES.get)
def test_train(row, scale, patch, variant):
    row(build, "train", NAMES[patch], scale.grid * patch, variant, patch=patch)
