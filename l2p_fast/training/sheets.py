"""Sample sheets: what a model draws while it is trained, the same prompts and noise each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UserError
from ..models.pixel import PixelModel
from .build import autocast
from .config import Config
from .data import Features
from .parallel import Workers


class Sheets:
    """Draws ``log.prompts`` side by side, the n-th with seed n; all processes take part.

    Raises:
        UserError: a size that the model can't draw, before the first sheet is due.
    """

    def __init__(self, model: PixelModel, features: Features, config: Config, workers: Workers):
        log, multiple = config.log, model.size_multiple
        self.model, self.config, self.workers = model, config, workers
        self.every = log.sample_every if log.prompts else 0
        gated = config.gate.every > 0
        if (log.sample_every or gated) and (log.height % multiple or log.width % multiple):
            raise UserError(f"log.height and log.width must be multiples of {multiple}, got {log.height} x {log.width}")
        if not self.every and not gated:
            return
        from ..sampling.pipeline import L2PPipeline, make_scheduler
        from ..sampling.request import Request, Setup
        from ..sampling.session import Session

        pipeline = L2PPipeline(_Trained(model), None, None, make_scheduler(config.objective.shift))
        pipeline.set_progress_bar_config(disable=True)
        self.session = Session(
            pipeline, Setup(attention="native"), texts=lambda prompts: [features[p].to(workers.device) for p in prompts]
        )
        self.requests = [
            Request(
                prompt, height=log.height, width=log.width, steps=log.sample_steps, guidance=log.guidance, seed=seed
            )
            for seed, prompt in enumerate(log.prompts)
        ]

    def due(self, step: int) -> bool:
        """Whether ``step`` has a sheet."""
        return self.every > 0 and step % self.every == 0

    def draw(self, stopping: Callable[[], bool], say: Callable[[str], None]) -> list[Image.Image] | None:
        """The images, one a prompt.

        There are none, on all processes at once, when ``stopping`` said so, and when an image is not finite: that is
        said, and the training goes on.

        Raises:
            UserError: too little memory.
        """

        def on_step(_: Any) -> None:
            if stopping():
                raise _Stopped

        try:
            with autocast(self.config, self.workers.device):
                return [self.session.draw(request, on_step).image for request in self.requests]
        except _Stopped:
            return None
        except _TooLarge as error:
            raise UserError("too little memory for the sample sheets; lower log.height and log.width") from error
        except UserError as error:
            say(f"warning: no sample sheet: {error}")
            return None
        finally:
            if self.config.parallel.fsdp:
                self.model.reshard()


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size as one sheet."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for number, image in enumerate(images):
        sheet.paste(image, (number * width, 0))
    return sheet


class _Stopped(Exception):
    """The run is asked to stop while a sheet is drawn."""


class _TooLarge(Exception):
    """A process has too little memory for a sheet."""


class _Trained(nn.Module):
    """The model as the sampler takes it, but all of it in its ``forward``: there FSDP gathers what it shares.

    Nothing is prepared beforehand, and nothing is tried again with less memory, since the other processes would not.
    """

    def __init__(self, model: PixelModel):
        super().__init__()
        self.__dict__["model"] = model  # not as a child: its parameters stay its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def prepare(self, cap_feats: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
        return cap_feats

    def forward(self, pixels: Tensor, t: Tensor, *, cond: list[Tensor], step: int) -> Tensor:
        try:
            return self.model(pixels, t, cond)
        except torch.OutOfMemoryError as error:
            raise _TooLarge from error
