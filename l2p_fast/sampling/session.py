"""A model that is loaded and draws: `Session.load(setup)`, then ``session.draw(request)`` for each image.

Every surface (the command line, a trainer's sample sheets, benchmarks, a server) draws through this and nothing else.
A session does one drawing at a time; calls from several threads wait for one another.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .. import __version__, ops
from ..errors import FieldError, UserError
from ..formats.lora import files_of
from ..loading import load_loras
from ..models import attention
from ..quantize import CodedLinear, products, stored
from ..variants import OF_PATCH
from .devices import free_bytes, pick_device, pick_dtype
from .drawing import Drawing, read_image, read_mask
from .facts import check_lora, check_text_encoder, find_model
from .footprint import counted
from .offload import arrange, pick
from .pipeline import L2PPipeline, load_pipeline
from .request import Lora, Request, Setup, drawn_size, interval_of, margins_of

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_CFG_BATCH = {"on": True, "off": False, "auto": "auto"}


@dataclass(frozen=True)
class Progress:
    """What ``on_step`` is told after each step.

    Attributes:
        step: how many are done, of ``total`` over both stages.
        stage: "coarse" or "full".
        pixels: (B, 3, H, W) fp32, the state of the B images that are drawn together; a copy of its own.
    """

    step: int
    total: int
    stage: str
    pixels: torch.Tensor


class Session:
    """A pipeline in its place.

    Args:
        pipeline: loaded, and where it is to run.
        setup: how it runs; what it leaves to be chosen ("auto") is chosen by `load` and at the first image's size.
        name: of the model, as it stands in an image's settings.
        texts: text features (L_i, C) of prompts, where the pipeline has no text encoder.
        report: lines on what runs, and why.

    Attributes:
        setup: with the choices made so far.
    """

    def __init__(
        self,
        pipeline: L2PPipeline,
        setup: Setup | None = None,
        name: str = "",
        texts: Callable[[Sequence[str]], list[torch.Tensor]] | None = None,
        report: Sequence[str] = (),
    ):
        self.pipeline, self.setup, self.name, self.texts = pipeline, setup or Setup(), name, texts
        self.report = list(report)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, setup: Setup, size: int | None = None) -> Session:
        """Load the model that ``setup`` names straight onto its device.

        Args:
            size: longer side in pixels of the images to come, by which a bundled model is chosen where none is named.

        Raises:
            UserError: a model, text encoder or device that isn't there or can't be used.
        """
        facts = find_model(setup.model, size)
        check_text_encoder(setup.text_encoder, facts)
        setup = replace(setup, lora=tuple(map(_identified, setup.lora)))
        device = pick_device(setup)
        dtype, why = pick_dtype(setup.dtype, device)
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        quantize = "stored" if setup.quantize == "none" else setup.quantize
        if quantize != "stored":
            products.check(quantize, device)  # before it is loaded, and where offloading will run it
        how, reason = setup.offload, ""
        if how == "auto":
            free = free_bytes(device)
            how, reason = pick(free, lambda: counted(setup, facts, device, size and (size, size)).peaks)
        places = [device if how in resident else torch.device("cpu") for resident in (("none", "text"), ("none",))]
        pipe = load_pipeline(facts.path, setup.text_encoder, dtype, places[0], quantize, text_device=places[1])
        if setup.head_memory_mb is not None:
            pipe.transformer.head.memory_mb = setup.head_memory_mb
        if kinds := stored.kinds(pipe.transformer):
            why += f", blocks stored in {', '.join(kinds)}"
        elif quantize != "stored":
            why += f", blocks in {quantize} (weights {products.weight_error(pipe.transformer):.1%} off)"
        count = sum(p.numel() for p in pipe.transformer.parameters())
        coded = (m for m in pipe.transformer.modules() if isinstance(m, CodedLinear))
        count += sum(layer.in_features * layer.out_features for layer in coded)
        counts = load_loras(pipe.transformer, [(lora.file, lora.scale) for lora in setup.lora]) if setup.lora else []
        if setup.compile:
            pipe.transformer.compile_repeated_blocks()
        arrange(pipe, how, device)
        words = f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        kind = str(pipe.transformer.dtype).removeprefix("torch.")
        obstacle = ops.head_obstacle(device, pipe.transformer.dtype)
        report = [
            f"model      {facts.name} (patch {pipe.patch_size}, {words} parameters)",
            f"device     {device} ({where}), {kind}{why}",
            f"extension  {ops.extension_status()}",
            f"head       {'kernels' if obstacle is None else f'the library, without kernels: {obstacle}'}",
        ]
        if setup.offload != "none":
            report.append(f"offload    {how}{reason}")
        for lora, (merged, over) in zip(setup.lora, counts, strict=True):
            report.append(f"lora       {lora} ({merged} layers fused, {over} as adapters)")
        setup = replace(setup, model=facts.name, device=str(device), dtype=kind, offload=how)
        return cls(pipe, setup, facts.name, report=report)

    def choose_attention(self, height: int, width: int) -> str:
        """Settle the attention backend for images of this size; returns its name and why, as words."""
        model, patch = self.pipeline.transformer, self.pipeline.patch_size
        tokens = (height // patch) * (width // patch) + attention.TEXT_TOKENS
        shape = 1, tokens, model.heads, model.width // model.heads
        given = shape, model.dtype, torch.device(self.pipeline.execution_device), model.biased
        name, why = self.setup.attention, ""
        if name == "auto":
            name, words = attention.fastest(*given)
            why = f" ({words})"
            self.setup = replace(self.setup, attention=name)
        else:
            attention.check(name, model.biased)
        how = attention.ragged(name, *given) if model.packs_rows else "ragged batches masked"
        return f"{name}{why}; {how}"

    def fill(self, request: Request, image: Image | None = None) -> Request:
        """``request`` with every choice that it leaves to the model made.

        Args:
            image: that it starts from, upright; None: the file that it names, if any.

        Raises:
            UserError: a size that the model can't draw, or an image that is missing.
        """
        pipe = self.pipeline
        if image is None and request.image is not None:
            image = read_image("image", request.image)
        if image is None and request.refine is not None:
            raise FieldError("refine", "has no image to draw anew; add {image}, or draw a small one first")
        own = None if image is None else image.size[::-1]
        height, width = drawn_size(request, own, OF_PATCH[pipe.patch_size].native_size, pipe.size_multiple)
        return replace(
            request,
            height=height,
            width=width,
            steps=request.steps or pipe.default_steps,
            guidance=pipe.default_guidance_scale if request.guidance is None else request.guidance,
            shift=request.shift or pipe.default_shift,
            strength=None if request.refine is not None else request.starts_at,
            mask_blend=pipe.default_mask_blend if request.edits and request.mask_blend is None else request.mask_blend,
            coarse_size=(pipe.config.coarse_size or 0) if request.coarse_size is None else request.coarse_size,
            coarse_strength=request.coarse_strength or pipe.config.coarse_strength,
        )

    def draw(
        self,
        request: Request,
        on_step: Callable[[Progress], None] | None = None,
        image: Image | None = None,
        mask: Image | None = None,
    ) -> Drawing:
        """Draw one image.

        Args:
            on_step: called after each step; what it raises ends the drawing.
            image, mask: upright, in place of the files ``request.image`` and ``request.mask``, which are but names
                then; a mask counts only where the request has one.

        Raises:
            UserError: what doesn't fit the model, too little memory, or an image that isn't finite.
        """
        return self.draw_together([request], on_step, [image], [mask])[0]

    def draw_together(
        self,
        requests: Sequence[Request],
        on_step: Callable[[Progress], None] | None = None,
        images: Sequence[Image | None] = (),
        masks: Sequence[Image | None] = (),
    ) -> list[Drawing]:
        """Draw several images as one batch, each from its own noise; they differ in what `settings_of` leaves out.

        Each is what `draw` makes of its request, up to the rounding of sums that a batch adds in another order.

        Args:
            on_step, images, masks: as for `draw`, an image and a mask for each request; none: of no request.

        Raises:
            UserError: as `draw`; requests of several sizes or settings.
        """
        images, masks = list(images) or [None] * len(requests), list(masks) or [None] * len(requests)
        with self._lock:
            filled = []
            for i, request in enumerate(requests):
                if request.image is not None and images[i] is None:
                    images[i] = read_image("image", request.image)
                    request = _with_digest(request, "image")
                if request.mask is not None and masks[i] is None:
                    masks[i] = read_mask("mask", request.mask, images[i].size)
                    request = _with_digest(request, "mask")
                filled.append(self.fill(request, images[i]))
            request = filled[0]
            if any(settings_of(other) != settings_of(request) for other in filled):
                raise UserError("images of several sizes or settings are not drawn together; draw them one by one")
            self.choose_attention(request.height, request.width)
            pipe, start, seconds = self.pipeline, time.perf_counter(), {}

            def note(_, step: int, t: torch.Tensor, tensors: dict[str, Any]) -> None:
                if pipe.execution_device.type == "cuda":
                    torch.cuda.synchronize(pipe.execution_device)
                seconds.setdefault(pipe.stage, []).append(time.perf_counter() - start)
                if on_step is not None:
                    on_step(Progress(step + 1, pipe.num_timesteps, pipe.stage, tensors["latents"]))

            words = {"prompt": [one.prompt for one in filled], "negative_prompt": [one.negative for one in filled]}
            if self.texts is not None:
                embeds, count = self.texts([*words["prompt"], *words["negative_prompt"]]), len(filled)
                words = {"prompt_embeds": embeds[:count], "negative_prompt_embeds": embeds[count:]}
            try:
                with attention.use(self.setup.attention):
                    drawn = pipe(
                        **words,
                        height=request.height,
                        width=request.width,
                        num_inference_steps=request.steps,
                        guidance_scale=request.guidance,
                        guidance_interval=interval_of(request.guidance_interval),
                        # the scheduler's own is left to it: some take none from outside
                        shift=None if request.shift == pipe.default_shift else request.shift,
                        generator=[torch.Generator().manual_seed(one.seed) for one in filled],
                        cfg_batch=_CFG_BATCH[request.cfg_batch],
                        cuda_graph=self.setup.cuda_graph,
                        coarse_size=request.coarse_size,
                        coarse_strength=request.coarse_strength,
                        callback_on_step_end=note,
                        callback_on_step_end_tensor_inputs=("latents",) if on_step is not None else (),
                        image=None if images[0] is None else images,
                        strength=request.starts_at,
                        mask_image=None if request.mask is None else masks,
                        mask_blend=request.mask_blend,
                        outpaint=None if request.outpaint is None else margins_of(request.outpaint),
                    ).images
            except torch.OutOfMemoryError as error:
                size = f"{request.width}x{request.height}"
                raise FieldError(
                    "device",
                    f"{self.setup.device} has too little memory for {size}; try {{offload}} model or a smaller size",
                ) from error
        batched = {True: "on", False: "off", None: request.cfg_batch}[pipe.cfg_batched]
        setup = replace(self.setup, head_memory_mb=pipe.transformer.head.memory_mb).as_dict()
        versions = {"version": __version__, "torch": torch.__version__}
        settings = [setup | replace(one, cfg_batch=batched).as_dict() | versions for one in filled]
        return [Drawing(image, its, seconds) for image, its in zip(drawn, settings, strict=True)]

    def peak_memory(self) -> str:
        """Peak memory so far, as words: of the CUDA allocator, else of the process."""
        device = self.pipeline.execution_device
        if device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB (CUDA allocator)"
        try:
            import resource
        except ImportError:  # Windows
            return "unknown on this system"
        unit = 1 if sys.platform == "darwin" else 1024
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB (process)"


def settings_of(request: Request) -> Request:
    """What requests have in common whose images can be drawn together: all but texts, seeds and digests."""
    return replace(request, prompt="", negative="", seed=0, image_sha256=None, mask_sha256=None)


def _identified(lora: Lora) -> Lora:
    """``lora`` with its digest: the file's, or that of the digests of several.

    Raises:
        FieldError: it isn't there, is none, or is another than the one whose digest it has.
    """
    check_lora(lora)
    digests = [file_digest(str(file)) for file in files_of(lora.file)]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    if lora.sha256 not in (None, digest):
        raise FieldError("lora", f"{lora.file} has changed since; give the one of that time")
    return replace(lora, sha256=digest)


def _with_digest(request: Request, name: str) -> Request:
    """``request`` with the digest of the file that it names.

    Raises:
        FieldError: the file is another than the one whose digest it has.
    """
    path, digest = getattr(request, name), f"{name}_sha256"
    found = file_digest(path)
    if getattr(request, digest) not in (None, found):
        raise FieldError(name, f"{path} has changed since; give the one of that time")
    return replace(request, **{digest: found})


def file_digest(path: str) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def draw_small(setup: Setup, requests: Sequence[Request], folder: Path, bar: bool = False) -> list[Path]:
    """The images that requests to refine start from: drawn by the setup's ``draft`` in its own size and its own way.

    That model is gone when this returns, so the one that refines has the memory.

    Args:
        requests: with their heights and widths, whose aspect the small images have.
        folder: where they go, as PNG.
        bar: whether each has a progress bar.

    Raises:
        UserError: as `Session.load` and `Session.draw`.
    """
    session = Session.load(replace(setup, model=setup.draft, draft=None))
    pipe, paths = session.pipeline, []
    pipe.set_progress_bar_config(disable=not bar)
    native, unit = OF_PATCH[pipe.patch_size].native_size, pipe.size_multiple
    for index, request in enumerate(requests):
        scale = native / max(request.height, request.width)
        height, width = (max(unit, round(side * scale / unit) * unit) for side in (request.height, request.width))
        small = Request(request.prompt, request.seed, request.negative, height, width)
        paths.append(folder / f"{index}.png")
        session.draw(small).save(paths[-1])
    del session, pipe
    gc.collect()
    return paths
