"""The source model's own objective: || (x0 - eps) - raw(x_sigma, 1 - sigma) ||^2, at randomly drawn noise levels.

Every draw comes from a generator of its own, seeded by what it belongs to (run, step, image): it depends on neither
the number of processes nor where a run was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.detailer import DetailerHead
from ..models.pixel import cut
from ..sampling import flow
from .config import GridConfig, ObjectiveConfig

SIGMA_BUCKETS = 4  # the loss is logged for each quarter of [0, 1]


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose seed is a digest of ``parts``."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_sigma(config: ObjectiveConfig, rng: torch.Generator, grid: GridConfig) -> float:
    """A noise level in (0, ``grid.sigma_max``].

    ``grid``: one of the levels a sampler of ``config.grid`` steps starts its steps from; ``continuous``: the same law
    without steps; ``logit_normal``: sigmoid of a normal variable, then the shift.
    """
    u, plain = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
    shift = 1.0 if plain < config.uniform_share else grid.shift or config.shift
    if config.sigma == "grid":
        s = 1 - int(u * config.grid) / config.grid
    elif config.sigma == "continuous":
        s = 1 - u
    else:
        normal = torch.randn((), generator=rng, dtype=torch.float64)
        s = torch.sigmoid(config.mean + config.std * normal).item()
    return shift * s / (1 + (shift - 1) * s) * grid.sigma_max


def draw_noise(config: ObjectiveConfig, shape: Sequence[int], seed: int | None, rng: torch.Generator) -> Tensor:
    """(3, H, W) fp32 noise on the CPU: the image's own for the whole run if it has a ``seed``, else from ``rng``."""
    if config.noise == "seed" and seed is not None:
        rng = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=rng)


def coarse_error(x0: Tensor, side: int) -> Tensor:
    """``x0`` (3, H, W) at ``side`` px and enlarged, less ``x0``: what a coarse start gets wrong at best."""
    small = F.interpolate(x0[None], [side, side], mode="area")
    return F.interpolate(small, x0.shape[-2:], mode="bicubic")[0] - x0


def coarse_noise(noise: Tensor, x0: Tensor, side: int, sigma_max: float, rng: torch.Generator) -> Tensor:
    """Noise of an image (3, H, W) that goes on at ``sigma_max`` from a coarse start c of ``side`` px, to train on.

    At level s its noisy image is that of a flow with noise + (1 - s) / s (c - x0). The blur is drawn up to twice that
    at ``sigma_max``: what a sampler leaves of it varies.
    """
    blur = (1 / sigma_max - 1) * 2 * torch.rand((), generator=rng).item()
    return noise + blur * coarse_error(x0, side)


def losses(
    model: nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, cap_feats: Sequence[Tensor],
    windows: Sequence[tuple[int, int, int, int]] | None = None, pyramid: float = 0.0,
) -> Tensor:  # fmt: skip
    """(B,) mean squared errors of the raw prediction.

    Args:
        x0, noise: (B, 3, H, W) fp32.
        sigma: (B,).
        cap_feats: B text features.
        windows: what the head sees of each image, as in the model's ``forward``.
        pyramid: weight of the errors of the small images inside the head (`small_images`).
    """
    x, target = flow.add_noise(x0, noise, sigma), flow.target(x0, noise)
    with small_images(model.head) if pyramid else contextlib.nullcontext([]) as found:
        raw = model(x, 1 - sigma, cap_feats, windows=windows)
    if windows is not None:
        x0, target = (cut(part, windows, model.patch_size) for part in (x0, target))
    error = (raw.float() - target).square().mean(dim=(1, 2, 3))
    for small in found:
        wanted = F.interpolate(x0, small.shape[-2:], mode="area")
        error = error + pyramid * (small.float() - wanted).square().mean(dim=(1, 2, 3))
    return error


@contextlib.contextmanager
def small_images(head: DetailerHead) -> Iterator[list[Tensor]]:
    """The first three channels of what the head's levels compute on the way out, before the activation.

    Trained to be the image at their size, they bring color through many layers to full size (deep supervision, Lee
    et al., arXiv 1409.5185) without a parameter of their own. Levels that run in bands are left out.
    """
    found: dict[int, Tensor] = {}
    rows = 0

    def note_size(_, inputs) -> None:
        nonlocal rows
        rows = inputs[0].shape[2]

    def note(k: int):
        def hook(_, __, out: Tensor) -> None:
            if out.shape[2] == rows >> k:
                found[k] = out[:, :3]

        return hook

    convs = {k: head.get_submodule(f"dec{level.name}")[0] for k, level in enumerate(head.levels) if k}
    convs[len(head.levels)] = head.bottleneck[0]
    hooks = [head.register_forward_pre_hook(note_size)]
    hooks += [conv.register_forward_hook(note(k)) for k, conv in convs.items()]
    images: list[Tensor] = []
    try:
        yield images
    finally:
        for hook in hooks:
            hook.remove()
        images += found.values()
