"""Sample sheets: what a model draws while it is trained, the same prompts and noise each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import nn

from ..errors import UserError
from ..models.zimage import L2PTransformer2DModel
from ..sampling import flow
from ..sampling.pixels import pixels_to_images
from .build import autocast
from .config import Config
from .data import Features
from .objective import generator
from .parallel import Workers


def check_sheet(config: Config, model: L2PTransformer2DModel) -> None:
    """Refuse a size of the sample sheets that the model can't draw, before the first is due."""
    log, multiple = config.log, model.size_multiple
    if log.sample_every and (log.height % multiple or log.width % multiple):
        raise UserError(f"log.height and log.width must be multiples of {multiple}, got {log.height} x {log.width}")


@torch.no_grad()
def sample_sheet(
    model: nn.Module, features: Features, config: Config, workers: Workers, stopping: Callable[[], bool]
) -> Image.Image | None:
    """Draw ``log.prompts`` side by side, each with the same noise at every call. All processes take part.

    Returns None where this is not the first process, and when ``stopping`` said so, on all of them at once.
    """
    log, shift, images = config.log, config.objective.shift, []
    for number, prompt in enumerate(log.prompts):
        x = torch.randn((1, 3, log.height, log.width), generator=generator("sample", number)).to(workers.device)
        levels = flow.sigmas(log.sample_steps, shift).tolist()
        texts = [features[text].to(workers.device) for text in (prompt, "")]
        for sigma, after in zip(levels[:-1], levels[1:], strict=True):
            if stopping():
                break
            with autocast(config, workers.device):
                t = torch.full((1,), 1 - sigma, device=workers.device)
                v_pos, v_neg = (flow.velocity(model(x, t, [text]).float()) for text in texts)
            x = flow.euler_step(x, flow.guide(v_pos, v_neg, log.guidance), sigma, after)
        else:
            images += pixels_to_images(x.cpu(), "pil")
    if config.parallel.fsdp:
        model.reshard()
    if not workers.first or len(images) < len(log.prompts):
        return None
    sheet = Image.new("RGB", (log.width * len(images), log.height))
    for number, image in enumerate(images):
        sheet.paste(image, (number * log.width, 0))
    return sheet
