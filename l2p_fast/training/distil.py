"""Objectives of distillation: the model learns what it does itself under guidance, or in several steps, in fewer.

The teacher is the model with its adapters off, so there is no second one in memory, and LoRA pairs are all that is
trained.

``guided``: the student's output without guidance is to be the teacher's with it (Meng et al., arXiv 2210.03142, at one
scale): half the evaluations. ``trajectory``: one step of the student is to lead where ``substeps`` guided steps of the
teacher do, as in progressive distillation (Salimans and Ho, arXiv 2202.00512), in one go and with guidance: the student
draws in ``grid`` steps without guidance. A segment begins at a noised image, so it need not be reached first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.adapters import without_adapters
from ..sampling import flow
from .config import ObjectiveConfig

Windows = Sequence[tuple[int, int, int, int]]


def losses(
    model: nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, cap_feats: Sequence[Tensor], empty: Tensor,
    config: ObjectiveConfig, windows: Windows | None = None,
) -> Tensor:  # fmt: skip
    """(B,) mean squared differences of the student's raw prediction from what the teacher makes of it.

    Args:
        x0, noise: (B, 3, H, W) fp32.
        sigma: (B,); of ``trajectory`` levels at which steps of a sampler of ``config.grid`` steps begin.
        cap_feats: B text features.
        empty: (L, C) text features of the prompt that guidance steers away from.
        windows: what the head sees of each image, of ``guided``.
    """
    x = flow.add_noise(x0, noise, sigma)
    with torch.no_grad(), without_adapters(model):
        if config.kind == "guided":
            wanted = guided(model, x, sigma, cap_feats, empty, config.guidance, windows)
        else:
            wanted = along_path(model, x, sigma, cap_feats, empty, config)
    raw = model(x, 1 - sigma, cap_feats, windows=windows)
    return (raw.float() - wanted).square().mean(dim=(1, 2, 3))


def guided(
    model: nn.Module, x: Tensor, sigma: Tensor, cap_feats: Sequence[Tensor], empty: Tensor, scale: float,
    windows: Windows | None = None,
) -> Tensor:  # fmt: skip
    """(B, 3, H, W) fp32: the raw prediction under guidance. The halves run one after the other, to save memory."""
    raw = model(x, 1 - sigma, cap_feats, windows=windows).float()
    if scale == 1:
        return raw
    negative = model(x, 1 - sigma, [empty] * len(cap_feats), windows=windows).float()
    return flow.guide(raw, negative, scale)


def along_path(
    model: nn.Module, x: Tensor, sigma: Tensor, cap_feats: Sequence[Tensor], empty: Tensor, config: ObjectiveConfig
) -> Tensor:
    """(B, 3, H, W) fp32: the raw prediction whose one Euler step from ``sigma`` ends where the guided path does.

    The path's steps are those of a sampler of ``config.grid`` x ``config.substeps`` steps.
    """
    start = sigma.double() / (config.shift - (config.shift - 1) * sigma.double())  # before the shift
    inner = torch.arange(config.substeps + 1, device=x.device, dtype=torch.float64) / (config.grid * config.substeps)
    plain = (start[:, None] - inner).clamp(min=0)
    levels = (config.shift * plain / (1 + (config.shift - 1) * plain)).float()
    levels[:, 0] = sigma
    state = x
    for now, then in zip(levels.T, levels.T[1:], strict=False):
        raw = guided(model, state, now, cap_feats, empty, config.guidance)
        state = flow.advance(state, flow.velocity(raw), *(level.view(-1, 1, 1, 1) for level in (now, then)))
    return (state - x) / (sigma - levels[:, -1]).view(-1, 1, 1, 1)


def teacher_passes(config: ObjectiveConfig) -> int:
    """Forward passes of the teacher for one of the student."""
    if config.kind == "flow":
        return 0
    return (1 if config.guidance == 1 else 2) * (1 if config.kind == "guided" else config.substeps)
