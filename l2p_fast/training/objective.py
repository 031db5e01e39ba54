"""The source model's own objective: || (x0 - eps) - raw(x_sigma, 1 - sigma) ||^2, at randomly drawn noise levels.

Every draw comes from a generator of its own, seeded by what it belongs to (run, step, picture): it depends on neither
the number of processes nor where a run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import flow
from .config import ObjectiveConfig

SIGMA_BUCKETS = 4  # the loss is logged for each quarter of [0, 1]


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose seed is a digest of ``parts``."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_sigma(config: ObjectiveConfig, rng: torch.Generator, highest: float = 1.0) -> float:
    """A noise level in (0, ``highest``].

    ``grid``: one of the levels a sampler of ``config.grid`` steps starts its steps from; ``continuous``: the same law
    without steps; ``logit_normal``: sigmoid of a normal variable, then the shift.
    """
    u, plain = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
    shift = 1.0 if plain < config.uniform_share else config.shift
    if config.sigma == "grid":
        s = 1 - int(u * config.grid) / config.grid
    elif config.sigma == "continuous":
        s = 1 - u
    else:
        normal = torch.randn((), generator=rng, dtype=torch.float64)
        s = torch.sigmoid(config.mean + config.std * normal).item()
    return shift * s / (1 + (shift - 1) * s) * highest


def draw_noise(config: ObjectiveConfig, shape: Sequence[int], seed: int | None, rng: torch.Generator) -> Tensor:
    """(3, H, W) fp32 noise on the CPU: the picture's own for the whole run if it has a ``seed``, else from ``rng``."""
    if config.noise == "seed" and seed is not None:
        rng = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=rng)


def losses(model: nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, cap_feats: Sequence[Tensor]) -> Tensor:
    """(B,) mean squared errors of the raw prediction; x0 and noise (B, 3, H, W) fp32, sigma (B,)."""
    raw = model(flow.add_noise(x0, noise, sigma), 1 - sigma, cap_feats)
    return (raw.float() - flow.target(x0, noise)).square().mean(dim=(1, 2, 3))
