"""Rectified flow as pure functions: the schedule, the noising, a step along the velocity and guidance.

x_sigma = (1 - sigma) * x0 + sigma * eps runs from the image (sigma = 0) to noise (sigma = 1). The network sees the
time t = 1 - sigma and returns ``raw`` = x0 - eps, the negative of the velocity dx/dsigma = eps - x0. Left out: samplers
of higher order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError


def sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels of a run: (num_steps + 1,) fp32, falling from 1 to 0.

    A uniform grid s is bent to shift * s / (1 + (shift - 1) * s), so more steps are spent where there is more noise.

    Raises:
        UserError: ``num_steps`` below 1, or ``shift`` not positive.
    """
    if num_steps < 1:
        raise UserError(f"the number of steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise UserError(f"the shift must be positive, got {shift}; 3 is the published value")
    s = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


def velocity(raw: Tensor) -> Tensor:
    """The velocity eps - x0 from the network's output x0 - eps."""
    return -raw


def target(x0: Tensor, eps: Tensor) -> Tensor:
    """What the network's raw output should be: x0 - eps."""
    return x0 - eps


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """The state at ``sigma``: (1 - sigma) * x0 + sigma * eps. A tensor ``sigma`` (B,) holds one level per sample."""
    if isinstance(sigma, Tensor):
        sigma = sigma.reshape(-1, *[1] * (x0.ndim - 1)) if sigma.ndim else sigma
    return (1 - sigma) * x0 + sigma * eps


def advance(x: Tensor, v: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """The state at ``sigma_next`` from the one at ``sigma``, along the velocity ``v``."""
    return x + v * (sigma_next - sigma)


def guide(v_pos: Tensor, v_neg: Tensor, g: float) -> Tensor:
    """Classifier-free guidance: v_neg + g * (v_pos - v_neg); g = 1 is no guidance."""
    return v_neg + g * (v_pos - v_neg)
