"""Sampling as a diffusers pipeline: prompt -> pixels, with no VAE between. The face of `denoise`.

The state is the image itself, fp32 in [-1, 1]; the transformer runs in its own dtype. What does not depend on the step
is computed once. Guidance has its usual meaning, v_neg + g * (v_pos - v_neg), so g = 1 is none. What belongs to one run
(guidance scale, stage, ...) is kept per thread and the scheduler is copied, so threads can share a pipeline.

Letters: B images, H x W pixels, N steps.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.loaders import ZImageLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import get_adapter_name, scale_lora_layers, unscale_lora_layers
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..errors import FieldError, UserError
from ..formats.checkpoint import hub_of
from ..formats.pipeline_folder import PipelineFolder, read_pipeline
from ..loading import load_lora, load_model, load_text_encoders, model_class
from ..models.pixel import PixelModel
from ..variants import NATIVE_TOKENS, OF_PATCH, SHIFT, SOURCES
from .denoise import Predictor, Stop, denoise
from .drawing import color_profile
from .editing import Kept, Source, make_kept_source, make_source
from .pixels import OUTPUT_TYPES, draw_noise, images_of, pixels_to_images, size_of
from .request import EDIT_STRENGTH, STRENGTH, check_number, check_size, interval_of, kept_size, margins_of

COARSE_STRENGTH = 0.6
# What diffusers calls the fields of a request.
_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


def make_scheduler(shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    """The Euler scheduler of L2P; `set_schedule` gives it the sigmas of `flow.sigmas`."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def set_schedule(
    scheduler: SchedulerMixin, num_steps: int, shift: float | None = None, sigmas: Sequence[float] | None = None
) -> Tensor:
    """Set ``scheduler`` to N steps; returns the noise level at which each of its predictions is made, then 0, fp32.

    Diffusers' Euler scheduler gets linspace(1, 0, N + 1), shifted: those are (N + 1,) levels. Schedulers of higher
    order (Heun, UniPC, DPM-Solver++ in flow mode) choose their own levels and may predict several times a step. Kept
    on the CPU, a step never waits for the device.

    Args:
        scheduler: a flow-matching scheduler.
        shift: None takes the configured one.
        sigmas: noise levels before the shift, falling, without the last 0; in place of ``num_steps``.

    Raises:
        UserError: a scheduler of another kind, or one that takes no shift or no sigmas.
    """
    config, takes = scheduler.config, inspect.signature(scheduler.set_timesteps).parameters
    flows = any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__) or (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    )
    if not flows:
        raise UserError(
            f"scheduler: wanted a flow-matching one, got {type(scheduler).__name__}; use "
            "FlowMatchEulerDiscreteScheduler, or give it use_flow_sigmas=True, prediction_type='flow_prediction'"
        )
    euler = hasattr(scheduler, "set_shift")
    if shift is not None and not euler:
        raise UserError(f"shift: {type(scheduler).__name__} takes it from its configuration; leave it out")
    if sigmas is not None and "sigmas" not in takes:
        raise UserError(f"sigmas: {type(scheduler).__name__} takes none; give num_inference_steps")
    if euler:
        scheduler.set_shift(config.shift if shift is None else shift)
        sigmas = np.linspace(1, 0, num_steps + 1)[:-1].tolist() if sigmas is None else list(sigmas)
        scheduler.set_timesteps(sigmas=sigmas)
    elif sigmas is not None:
        scheduler.set_timesteps(sigmas=np.asarray(sigmas, np.float64))
    else:
        scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


_PAIRS = tuple((f"text_encoder{end}", f"tokenizer{end}") for end in ("", "_2", "_3"))
_MORE = [name for pair in _PAIRS[1:] for name in pair]


class _Run(threading.local):
    """What belongs to the run of the present thread."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    stage: str = ""
    cfg_batched: bool | None = None
    attention_kwargs: dict[str, Any] | None = None

    def __reduce__(self):  # copies of a pipeline begin anew
        return _Run, ()


class L2PPipeline(DiffusionPipeline, ZImageLoraLoaderMixin):
    """Text to image, image to image, inpainting and outpainting.

    Args:
        transformer: an `L2PTransformer2DModel`, or the pixel model of another source.
        text_encoder: its source's text encoder (Z-Image's: a transformers Qwen3 model); None when only
            ``prompt_embeds`` are used.
        tokenizer: its tokenizer.
        scheduler: `make_scheduler()`, or any flow-matching scheduler of diffusers.
        default_steps, default_guidance_scale: what `__call__` takes when not told; None: by the patch size.
        coarse_size: tokens of the longer side of the coarse start (see `__call__`); None: no coarse start.
        coarse_strength: sigma in (0, 1] at which the full-size run takes over from the coarse one.
        full_guidance_scale: the most guidance at full size after a coarse start, which has decided what the image
            shows; 1 halves the work there. None: no limit.
        text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3: of sources that have several.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer"
    _optional_components = ["text_encoder", "tokenizer", *_MORE]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        transformer: PixelModel,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        scheduler: SchedulerMixin,
        default_steps: int | None = None,
        default_guidance_scale: float | None = None,
        coarse_size: int | None = None,
        coarse_strength: float | None = None,
        full_guidance_scale: float | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        more = dict(zip(_MORE, (text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3), strict=True))
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, **more
        )
        self.register_to_config(
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            coarse_size=coarse_size,
            coarse_strength=coarse_strength,
            full_guidance_scale=full_guidance_scale,
        )
        self._interrupt = False
        self._run = _Run()

    @property
    def components(self) -> dict[str, Any]:
        """Modules and defaults, so that ``L2PPipeline(**pipe.components)`` is the same pipeline."""
        defaults = (
            "default_steps", "default_guidance_scale", "coarse_size", "coarse_strength", "full_guidance_scale",
        )  # fmt: skip
        return super().components | {name: self.config[name] for name in defaults}

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        """The classes that diffusers takes for a component, by name: any pixel model.

        Asked before a folder is loaded, so their modules are imported then: diffusers itself imports none of ours.
        """
        return super()._get_signature_types() | {"transformer": tuple(model_class(name) for name in SOURCES)}

    @property
    def execution_device(self) -> torch.device:
        """Where it computes, offloaded or not."""
        return self._execution_device

    @property
    def patch_size(self) -> int:
        """Pixels of a side of a patch."""
        return self.transformer.patch_size

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of, in pixels."""
        return self.transformer.size_multiple

    @property
    def default_steps(self) -> int:
        """Steps when `__call__` is not told how many."""
        return self.config.default_steps or SOURCES[self.transformer.source].steps or OF_PATCH[self.patch_size].steps

    @property
    def default_guidance_scale(self) -> float:
        """Guidance scale when `__call__` is not told."""
        own, source = self.config.default_guidance_scale, SOURCES[self.transformer.source].guidance_scale
        return next(g for g in (own, source, OF_PATCH[self.patch_size].guidance_scale) if g is not None)

    @property
    def default_shift(self) -> float:
        """Shift of the noise schedule when `__call__` is not told."""
        return self.scheduler.config.get("shift", self.scheduler.config.get("flow_shift", SHIFT))

    @property
    def default_mask_blend(self) -> int:
        """Pixels over which an edit is blended when `__call__` is not told: half a patch."""
        return self.patch_size // 2

    @property
    def guidance_scale(self) -> float:
        """Of the run of this thread; a callback may change it (``pipe._guidance_scale``), as in other pipelines."""
        return self._run.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._run.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._run.guidance_scale = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run of this thread has guidance."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Predictions that the run of this thread makes, over both stages."""
        return self._run.num_timesteps

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Given to the run of this thread."""
        return self._run.attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after that step, as in other diffusers pipelines."""
        return self._interrupt

    @property
    def stage(self) -> str:
        """The stage now running in this thread: "coarse" or "full"; a callback may ask."""
        return self._run.stage

    @property
    def cfg_batched(self) -> bool | None:
        """Whether the last run took both halves of guidance as one batch to its end; None: it had no guidance."""
        return self._run.cfg_batched

    def encode_prompt(
        self, prompts: Sequence[str], device: torch.device | None = None, max_sequence_length: int | None = None
    ) -> list[Tensor]:
        """Features (L_i, C) of each prompt, as the pipeline of the model's source makes them."""
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("this pipeline has no text encoder: load one, or pass (negative_)prompt_embeds")
        device = device or self._execution_device
        encoders = [(getattr(self, encoder), getattr(self, tokenizer)) for encoder, tokenizer in _PAIRS]
        encoders = [pair for pair in encoders if pair[0] is not None]
        return self.transformer.encode(encoders, prompts, device, max_sequence_length or self.transformer.max_tokens)

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs) -> None:
        """As in diffusers; what is a file is read by `formats.lora`, which knows more kinds and more trainers' names.

        Args:
            source: a path, or a hub id; or a state dict in diffusers' names, which goes to diffusers, as does a hub id
                without a ``weight_name``.
            adapter_name: None: default_0, default_1, ...
            kwargs: diffusers' own; ``weight_name`` is a file of the folder or repository ``source``.

        Raises:
            UserError: see `formats.lora.read_lora`; a file that can't be downloaded.
        """
        name = kwargs.get("weight_name")
        here = isinstance(source, (str, os.PathLike)) and os.path.exists(source)
        if not here and (name is None or not isinstance(source, str)):
            super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)
            return
        path = Path(source, name or "") if here else _download(source, name, kwargs)
        load_lora(self.transformer, path, adapter=adapter_name or get_adapter_name(self.transformer))

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: put the adapters into the weights; all of them or none.

        Raises:
            UserError: weights of so few bits that they can't take them, or layers without the bias that is added to.
        """
        from ..models.adapters import check_fusing  # PEFT takes long to import

        check_fusing(self.transformer)
        super().fuse_lora(*args, **kwargs)

    def coarse_resolution(self, height: int, width: int, coarse_size: int | None = None) -> tuple[int, int] | None:
        """Height and width in pixels of the coarse start of a ``height`` x ``width`` image; None: it has none.

        The longer side gets ``coarse_size`` tokens (the pipeline's own by default; 0: no coarse start), the shorter one
        follows the aspect. An image of no more tokens than that needs no coarse start.
        """
        tokens = self.config.coarse_size if coarse_size is None else coarse_size
        longer = max(height, width)
        if not tokens or longer <= tokens * self.patch_size:
            return None
        unit, scale = self.size_multiple, tokens * self.patch_size / longer
        coarse = [max(unit, round(side * scale / unit) * unit) for side in (height, width)]
        return coarse[0], coarse[1]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        shift: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        mask_blend: int | None = None,
        outpaint: Sequence[int] | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        max_sequence_length: int | None = None,
        cfg_batch: bool | str = "auto",
        cuda_graph: bool = False,
        coarse_size: int | None = None,
        coarse_strength: float | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[L2PPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw images of prompts.

        Args:
            prompt: one prompt or n.
            negative_prompt: what guidance steers away from: one for all, or n.
            height, width: in pixels, multiples of ``size_multiple``; by default the model's own size, or the image's.
            num_inference_steps: N; by default 30 for patch 16, 50 for larger ones, or what the pipeline's config says.
            sigmas: noise levels before the shift, falling, in place of ``num_inference_steps``.
            guidance_scale: g; up to 1 guidance is off, which halves the work. By default 2.0 for patch 16, 4.0 for
                larger.
            guidance_interval: lowest and highest noise level (sigma, in [0, 1]) of the steps that have guidance; the
                others take half the work. None: all have.
            shift: of the noise schedule; by default the scheduler's (3).
            num_images_per_prompt: B = n times this.
            generator: one drawing the images' noise in turn, or B: then an image does not depend on its neighbors.
            latents: (B, 3, H, W) noise to use instead of drawing it (that of the full-size stage); also ``noise``.
            image: one to start from (image-to-image), n or B; see `pixels.image_to_tensor`.
            strength: in (0, 1]: the share of the steps that an image-to-image run takes; 1 ignores the image. By
                default 0.6, with ``mask_image`` or ``outpaint`` 1.
            mask_image: masks of ``image``, 1, n or B and of its size; see `pixels.mask_to_tensor`. White is drawn,
                black comes back exactly, and a gray pixel takes that share of the run's steps. The size is the image's
                own, whether a multiple or not.
            mask_blend: pixels within what is drawn over which its strength rises; by default half a patch.
            outpaint: pixels to add to ``image``: left, top, right, bottom.
            prompt_embeds, negative_prompt_embeds: n tensors (L_i, C) instead of the prompts.
            max_sequence_length: tokens of a prompt that are read, at most (and by default) the model's: 512.
            cfg_batch: both halves of guidance as one batch: True, False, or "auto" (True until memory forbids).
            cuda_graph: run the steps by CUDA graphs (`graphs`), where that can be. A callback must then leave the
                model's weights and the attention backend as they are.
            coarse_size, coarse_strength: override the config's; ``coarse_size`` 0 switches the coarse start off. With
                it the image is first sampled small, enlarged, noised to the first sigma <= ``coarse_strength`` and
                finished at full size. Both noises come from the same generator, the coarse one first.
            attention_kwargs: {"scale": s} weighs the LoRA adapters that are loaded.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W) in [0, 1], or "latent": the state, about [-1, 1].
            return_dict: False returns a tuple with the images.
            callback_on_step_end: called with the pipeline, the step (counted over both stages), its timestep in
                [0, 1000] and the tensors asked for; it may return others in their place.

        Returns:
            ``images`` in the form that ``output_type`` asks.

        Raises:
            UserError: arguments that don't fit the model or each other, or a state that isn't finite.
        """
        prompts, negatives = _check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        images = [] if image is None else images_of(image)
        masks = [] if mask_image is None else images_of(mask_image)
        margins = margins_of(None if outpaint is None else ",".join(map(str, outpaint)))
        lowest, highest = interval_of(None if guidance_interval is None else ",".join(map(str, guidance_interval)))
        edits = mask_image is not None or outpaint is not None
        for name, given, needed in (("image", image, images), ("mask_image", mask_image, masks)):
            if given is not None and not needed:
                raise UserError(f"{name}: wanted at least one, got none")
        if edits and not images:
            raise UserError("mask_image and outpaint have no effect without image")
        (height, width), shown = self._check_size(height, width, images, margins if edits else None)
        if strength is None:
            strength = EDIT_STRENGTH if edits else STRENGTH
        steps, sigmas = self._check_steps(num_inference_steps, sigmas)
        guidance = self.default_guidance_scale if guidance_scale is None else guidance_scale
        coarse_strength = coarse_strength or self.config.coarse_strength or COARSE_STRENGTH
        numbers = {
            "guidance": guidance, "shift": shift, "strength": strength, "coarse_strength": coarse_strength,
            "coarse_size": coarse_size, "mask_blend": mask_blend,
        }  # fmt: skip
        for name, value in numbers.items():
            check_number(name, value, _NAMES.get(name))
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if max_sequence_length is not None and not 1 <= max_sequence_length <= self.transformer.max_tokens:
            most = self.transformer.max_tokens
            raise UserError(f"max_sequence_length must be from 1 to {most}, got {max_sequence_length}")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if cfg_batch not in (True, False, "auto"):
            raise UserError(f"cfg_batch must be True, False or 'auto', got {cfg_batch!r}")
        if (lowest, highest) != (0, 1) and getattr(self.transformer, "is_cache_enabled", False):
            from ..models.caches import check_unguided_steps  # it takes long to import, and is by now

            check_unguided_steps(self.transformer._cache_config, cfg_batch)
            cfg_batch = False
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(f"a callback can be given {self._callback_tensor_inputs}, not {sorted(unknown)}")
        if unknown := set(attention_kwargs or {}) - {"scale"}:
            raise UserError(f"attention_kwargs: only scale has a meaning here, got {sorted(unknown)}")
        if latents is not None and noise is not None:
            raise UserError("latents and noise are two names of one argument; give one")
        noise = latents if noise is None else noise

        run, device = self._run, self._execution_device
        self._interrupt, run.cfg_batched, run.guidance_scale = False, None, float(guidance)
        run.attention_kwargs = attention_kwargs
        guided = self.do_classifier_free_guidance
        texts = prompts if prompt_embeds is None else []
        rest = negatives if guided and negative_prompt_embeds is None else []
        features = self.encode_prompt([*texts, *rest], device, max_sequence_length) if [*texts, *rest] else []
        positive = features[: len(texts)] if prompt_embeds is None else prompt_embeds
        negative = features[len(texts) :] if negative_prompt_embeds is None else negative_prompt_embeds
        caps = [
            [cap.to(device, self.transformer.dtype) for cap in half for _ in range(num_images_per_prompt)]
            for half in (positive, negative if guided else [])
        ]
        batch = len(caps[0])
        if guided and len(caps[1]) != batch:
            raise UserError(f"negative prompts: wanted 1 or {len(positive)}, got {len(negative)}")
        if noise is not None and tuple(noise.shape) != (batch, 3, height, width):
            raise UserError(f"noise: wanted a shape of {(batch, 3, height, width)}, got {tuple(noise.shape)}")

        levels = set_schedule(copy.deepcopy(self.scheduler), steps, shift, sigmas)
        order, total = self.scheduler.order, len(levels) - 1
        first, coarse, source, kept = 0, None, None, None
        if images:
            images = _spread("image", images, batch, num_images_per_prompt)
            masks = masks and _spread("mask_image", masks, batch, num_images_per_prompt)
            blend = self.default_mask_blend if mask_blend is None else mask_blend
            size = height, width
            source = make_kept_source(images, masks, margins, size, blend) if edits else make_source(images, size)
            first = min(steps - 1, int(steps - steps * strength)) * order
            kept = Kept(source, first, total) if edits else None
        if source is None or (edits and not first):
            coarse = self.coarse_resolution(height, width, coarse_size)
        if coarse:
            # 0.6 is not exactly 0.6 in fp32
            first = int((levels[:-1:order] > coarse_strength + 1e-6).sum()) * order
            first = min((steps - 1) * order, first)
            coarse = coarse if first else None  # at sigma 1 nothing of a coarse image would be left
        run.num_timesteps = total - first + (total if coarse else 0)

        limit = self.config.full_guidance_scale if coarse else None

        def stage(name: str, pixels: Tensor, begin: int, done: int, kept: Kept | None) -> Tensor:
            run.stage = name

            def scale(sigma: float) -> float:
                if not lowest - 1e-6 <= sigma <= highest + 1e-6:  # 0.6 is not exactly 0.6 in fp32
                    return 1.0
                limited = name == "full" and limit is not None
                return min(run.guidance_scale, limit) if limited else run.guidance_scale

            scheduler = copy.deepcopy(self.scheduler)  # it counts its own steps, and keeps predictions
            times = 1 - set_schedule(scheduler, steps, shift, sigmas)[:-1]
            predict = Predictor(self.transformer, *caps, tuple(pixels.shape[-2:]), times, cfg_batch, cuda_graph)
            size = f"{pixels.shape[3]}x{pixels.shape[2]}"
            bar.set_description(f"{name} {size}" if coarse else size)

            def on_step(i: int, state: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is not None:
                    # a callback may keep the states it is given
                    given = {"latents": lambda: state.clone(), "prompt_embeds": lambda: list(predict.positive)}
                    given = {name: given[name]() for name in callback_on_step_end_tensor_inputs}
                    answer = callback_on_step_end(self, done + i - begin, scheduler.timesteps[i], given) or {}
                    # One that ends guidance hands back the last row alone: the rows that are left stay as they are.
                    if len(embeds := answer.get("prompt_embeds", ())) == batch:
                        predict.replace_positive(embeds)
                    if (changed := answer.get("latents")) is not None:
                        state = changed.to(device, torch.float32)
                if self._interrupt:
                    raise Stop
                return state

            try:
                return denoise(predict, pixels, scheduler, scale, begin, on_step, kept)
            finally:
                run.cfg_batched = predict.cfg_batched

        lora_scale = (attention_kwargs or {}).get("scale")
        if lora_scale is not None:
            scale_lora_layers(self.transformer, lora_scale)
        try:
            with self.progress_bar(total=run.num_timesteps) as bar:
                if coarse:
                    small = None if kept is None else kept.resized(*coarse).to(device)
                    start = stage("coarse", draw_noise((batch, 3, *coarse), generator).to(device), 0, 0, small)
                    start = F.interpolate(start.clamp_(-1, 1), (height, width), mode="bicubic")
                kept = kept and kept.to(device)
                given = noise is not None  # not ours to write over
                if noise is None:
                    noise = draw_noise((batch, 3, height, width), generator)
                pixels = noise.to(device, torch.float32, copy=given)
                del noise
                if coarse:
                    source = Source(start if kept is None else kept.put_source_(start, first))
                    del start
                elif kept is not None:
                    source = kept.source
                if source is not None:
                    source.to(device).noised_(pixels, float(levels[first]))
                del source
                if not self._interrupt:
                    pixels = stage("full", pixels, first, total if coarse else 0, kept)
                if kept is not None:  # also where a callback has stopped the run, or changed the last state
                    kept.put_source_(pixels, total - 1)
        finally:
            if lora_scale is not None:
                unscale_lora_layers(self.transformer, lora_scale)

        drawn = pixels_to_images(pixels[:, :, : shown[0], : shown[1]], output_type)
        if images and output_type == "pil":
            for one, given in zip(drawn, images * (batch // len(images)), strict=True):
                if isinstance(given, PIL.Image.Image) and (profile := color_profile(given)) is not None:
                    one.info["icc_profile"] = profile
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    def _check_size(
        self, height: int | None, width: int | None, images: Sequence[Any], margins: tuple[int, int, int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of the run, and of what it returns; ``margins`` of an image of which a part is kept."""
        multiple, sides = self.size_multiple, []
        for name, value in (("height", height), ("width", width)):
            try:
                sides.append(None if value is None else operator.index(value))  # numpy's integers too
            except TypeError:
                raise FieldError(name, f"must be a whole number of pixels, got {value!r}") from None
        if margins is not None:
            shown = kept_size(sides, size_of(images[0]), margins)
            return tuple(-(-side // multiple) * multiple for side in shown), shown
        own = (NATIVE_TOKENS * self.patch_size,) * 2
        if images:
            own = tuple(max(multiple, round(side / multiple) * multiple) for side in size_of(images[0]))
        sides = tuple(default if side is None else side for side, default in zip(sides, own, strict=True))
        for name, side in zip(("height", "width"), sides, strict=True):
            check_size(name, side, multiple)
        return sides, sides

    def _check_steps(self, steps: int | None, sigmas: Sequence[float] | None) -> tuple[int, list[float] | None]:
        if sigmas is not None:
            sigmas = [float(sigma) for sigma in sigmas]
            falling = all(after < before for before, after in zip([1.0 + 1e-9, *sigmas], sigmas, strict=False))
            if not sigmas or not falling or sigmas[-1] <= 0:
                raise UserError("sigmas must fall from at most 1 and stay above 0 (the last 0 is added)")
            if steps not in (None, len(sigmas)):
                raise UserError(f"num_inference_steps is {steps}, but there are {len(sigmas)} sigmas; leave one out")
            return len(sigmas), sigmas
        try:
            steps = self.default_steps if steps is None else operator.index(steps)
        except TypeError:
            raise FieldError(_NAMES["steps"], f"must be a whole number of at least 1, got {steps!r}") from None
        check_number("steps", steps, _NAMES["steps"])
        return steps, None


diffusers.L2PPipeline = L2PPipeline  # where `DiffusionPipeline.from_pretrained` looks for a folder's class


def _check_prompts(prompt, negative_prompt, prompt_embeds, negative_embeds) -> tuple[list[str], list[str]]:
    if (prompt is None) == (prompt_embeds is None):
        raise UserError("give either prompt or prompt_embeds")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    count = len(prompts) if prompt_embeds is None else len(prompt_embeds)
    if not count:
        raise UserError("prompt: wanted at least one, got an empty list")
    negatives = [negative_prompt or ""] if isinstance(negative_prompt, (str, type(None))) else list(negative_prompt)
    negatives = negatives * count if len(negatives) == 1 else negatives
    if negative_embeds is None and len(negatives) != count:
        raise UserError(f"negative_prompt: wanted 1 or {count}, got {len(negatives)}")
    if not all(isinstance(text, str) for text in prompts + negatives):
        raise UserError("prompt and negative_prompt must be strings or lists of strings")
    return prompts, negatives


def _spread(name: str, values: list[Any], batch: int, each: int) -> list[Any]:
    """One for all, or one for each of ``batch`` images, of which a prompt has ``each``."""
    if len(values) * each == batch and each > 1:
        values = [value for value in values for _ in range(each)]
    if len(values) not in (1, batch):
        raise UserError(f"{name}: wanted 1, {batch // each} or {batch}, got {len(values)}")
    return values


def _download(repository: str, name: str, options: dict[str, Any]) -> Path:
    """A file of a repository of the hub, fetched once; ``options`` are those of diffusers' loaders."""
    from huggingface_hub import hf_hub_download

    known = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
    try:
        return Path(hf_hub_download(repository, name, **{key: options[key] for key in known if key in options}))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"can't get {name} of {repository} from the hub: {reason}") from error


def load_pipeline(
    model: str | os.PathLike,
    text_encoder: str | os.PathLike | None = None,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    text_device: torch.device | str | None = None,
) -> L2PPipeline:
    """Load a pipeline folder, or a checkpoint (file, shards or transformer folder) with a text encoder beside it.

    Weights are read straight to ``device`` in ``torch_dtype``, or quantized on the way. Of a pipeline folder only
    tensors and JSON are read: no code of its own runs, and the classes are ours whatever it names.

    Args:
        model: path. A pipeline folder has a ``model_index.json``.
        text_encoder: folder or hub id with subfolders ``text_encoder`` and ``tokenizer``, such as
            Tongyi-MAI/Z-Image-Turbo; needed unless ``model`` is a pipeline folder.
        torch_dtype: of transformer and text encoder; None: as the transformer is stored (`Checkpoint.default_dtype`).
        device: where they go.
        quantize: "fp8", "int8" or "nf4": the blocks of transformer and text encoder in 8 or 4 bits; "stored": as the
            files have them. None: in full.
        text_device: where the text encoder goes; None: to ``device``, too.

    Raises:
        UserError: a file that can't be used, or no text encoder.
    """
    model = os.fspath(model)
    is_pipeline = os.path.isfile(os.path.join(model, "model_index.json"))
    if not is_pipeline and text_encoder is None:
        raise UserError(f"{model} holds no text encoder; name one as well, for example {hub_of(model)}")
    stored = read_pipeline(model) if is_pipeline else PipelineFolder({}, SHIFT)
    transformer = load_model(
        os.path.join(model, "transformer") if is_pipeline else model, torch_dtype, device, quantize=quantize
    )
    folder, source = model if text_encoder is None else text_encoder, transformer.source
    loaded = load_text_encoders(folder, source, transformer.dtype, text_device or device, quantize)
    (encoder, tokenizer), more = loaded[0], [part for pair in loaded[1:] for part in pair]
    scheduler = make_scheduler(stored.shift)
    return L2PPipeline(
        transformer, encoder, tokenizer, scheduler, **stored.defaults, **dict(zip(_MORE, more, strict=False))
    )
