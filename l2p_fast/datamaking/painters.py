"""What draws a request: a `Session` of ours, or any text-to-image pipeline of diffusers."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import __version__
from ..errors import UserError
from ..files import near_path
from ..sampling.drawing import Drawing
from ..sampling.facts import check_lora, check_memory, check_text_encoder, find_model
from ..sampling.request import Lora, Request, Setup, check_size
from .llm import short

Painter = Callable[[Request], Drawing]


@dataclass(frozen=True)
class Source:
    """A model of ours or a diffusers pipeline, not yet loaded.

    Attributes:
        name: of the model, as it is kept with the images.
        request: with the size, where it is known before loading.
    """

    name: str
    request: Request
    setup: Setup
    is_pipeline: bool

    @classmethod
    def of(cls, setup: Setup, request: Request, pipeline: str | None) -> Source:
        """What ``pipeline`` names, or else ``setup``.

        Raises:
            UserError: nothing there, a size that it can't draw, or a file of ``setup`` that holds no LoRA.
        """
        for lora in setup.lora:
            check_lora(lora)
        if pipeline is not None:
            check_pipeline(pipeline)
            return cls(pipeline, request, setup, True)
        facts = find_model(setup.model, max(request.height, request.width) if request.height else None)
        check_text_encoder(setup.text_encoder, facts)
        sides = {"height": request.height or facts.native_size, "width": request.width or facts.native_size}
        for field, side in sides.items():
            check_size(field, side, facts.size_multiple)
        check_memory(*sides.values(), facts.size_multiple or 64)
        return cls(facts.name, replace(request, **sides), setup, False)

    def painter(self, device: str) -> tuple[Painter, list[str]]:
        """Load it onto ``device``; returns what draws, and lines on what runs."""
        if self.is_pipeline:
            return pipeline_painter(self.name, device, self.setup.dtype, self.setup.lora)
        return session_painter(replace(self.setup, device=device), max(self.request.height, self.request.width))


def session_painter(setup: Setup, longest: int | None) -> tuple[Painter, list[str]]:
    """A session's, and its lines on what runs.

    Raises:
        UserError: a model that isn't there or can't be used.
    """
    from ..sampling.session import Session

    session = Session.load(setup, longest)
    session.pipeline.set_progress_bar_config(disable=True)
    return session.draw, session.report


def check_pipeline(name: str) -> None:
    """That ``name`` is a pipeline's folder or has a hub id's form.

    Raises:
        UserError: it is not.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "model_index.json")):
            raise UserError(f"--pipeline {name} holds no model_index.json; give the folder of a diffusers pipeline")
    elif not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise UserError(f"--pipeline {name} is neither a folder nor a hub id{near_path(name)}")


def pipeline_painter(name: str, device: str, dtype: str, loras: Sequence[Lora] = ()) -> tuple[Painter, list[str]]:
    """That of a diffusers pipeline, of which no Python file is run; ``guidance`` is what it takes guidance for.

    Raises:
        UserError: it can't be loaded, draws no images of prompts, or takes no such LoRA.
    """
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        pipe = DiffusionPipeline.from_pretrained(
            name, torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=os.path.isdir(name)
        ).to(device)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"can't load the pipeline {name}: {short(error)}") from error
    takes = inspect.signature(pipe.__call__).parameters
    if "prompt" not in takes or "generator" not in takes:
        raise UserError(f"{type(pipe).__name__} in {name} draws no images of prompts; give a text-to-image pipeline")
    lay_loras(pipe, loras)
    pipe.set_progress_bar_config(disable=True)
    made_by = {"model": name, "pipeline": type(pipe).__name__, "lora": [lora.as_dict() for lora in loras]}
    made_by |= {"version": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}

    def draw(request: Request) -> Drawing:
        asked = {
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "negative_prompt": request.negative or None,
        }
        options = {key: value for key, value in asked.items() if value is not None and key in takes}
        generator = torch.Generator().manual_seed(request.seed)
        try:
            image = pipe(prompt=request.prompt, generator=generator, **options).images[0].convert("RGB")
        except (ValueError, RuntimeError, TypeError) as error:  # torch's lack of memory among them
            raise UserError(
                f"{type(pipe).__name__} can't draw {request.width} x {request.height}: {short(error)}"
            ) from error
        return Drawing(image, {**request.as_dict(), **made_by}, {})

    return draw, [f"pipeline   {type(pipe).__name__} of {name}", f"device     {device}, {dtype}"]


def lay_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Lay ``loras`` over a diffusers pipeline by its own loader, each at its scale.

    Raises:
        UserError: the pipeline has no such loader, or it refuses a file.
    """
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} takes no LoRA; leave --lora out")
    from ..formats.lora import files_of

    names = [f"lora_{number}" for number in range(len(loras))]
    for adapter, lora in zip(names, loras, strict=True):
        files = [file for file in files_of(lora.file) if file.suffix == ".safetensors"]
        if len(files) != 1:
            raise UserError(f"--lora {lora.file} holds {len(files)} files for one LoRA; name the one to take")
        try:
            pipe.load_lora_weights(str(files[0].parent), weight_name=files[0].name, adapter_name=adapter)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            raise UserError(f"--lora {lora.file} does not fit {type(pipe).__name__}: {short(error)}") from error
    if loras:
        pipe.set_adapters(names, [lora.scale for lora in loras])
