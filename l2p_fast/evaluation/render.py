"""Drawing what a benchmark asks for, through a `Session`; by other samplers and with a moving patch grid as well."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from tqdm import tqdm

from ..sampling.drawing import SUFFIXES, save_image
from ..sampling.pipeline import L2PPipeline
from ..sampling.session import Session
from .gridshift import ShiftedGrid
from .suites import Work

_SCHEDULERS = {
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "stochastic": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True),
    "heun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
    "unipc": lambda shift: UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    ),
}


def draw_works(session: Session, works: Sequence[Work]) -> None:
    """Draw every file of ``works`` and write it, whole or not at all."""
    session.pipeline.set_progress_bar_config(disable=True)
    for work in tqdm(works, desc="images", unit="file", disable=not sys.stderr.isatty()):
        drawings = []
        for request in work.requests:
            with torch.random.fork_rng():
                torch.manual_seed(request.seed)  # of a sampler that draws noise at every step
                drawings.append(session.draw(request))
        image = drawings[0].image
        if len(drawings) > 1:
            image = square([drawing.image for drawing in drawings])
        save_image(image, work.path, SUFFIXES[work.path.suffix], drawings[0].settings)


def square(images: Sequence[Image.Image]) -> Image.Image:
    """Four images of one size as two rows of two."""
    width, height = images[0].size
    whole = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(images):
        whole.paste(image, (number % 2 * width, number // 2 * height))
    return whole


def varied(session: Session, sampler: str, grid: str) -> Session:
    """The same model under another sampler (of `suites.SAMPLERS`), its patch grid moved (a way of `suites.WAYS`)."""
    pipeline = session.pipeline
    parts = dict(pipeline.components) | {"scheduler": _SCHEDULERS[sampler](pipeline.default_shift)}
    if grid != "none":
        parts["transformer"] = ShiftedGrid(pipeline.transformer, grid)
    return Session(L2PPipeline(**parts), session.setup, session.name, session.texts)
