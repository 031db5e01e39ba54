"""Sampling as a diffusers pipeline: prompt -> pixels, with no VAE between.

The state is the picture itself, fp32 in [-1, 1]; the transformer runs in its own dtype. What does not depend on the
step is computed once (`L2PTransformer2DModel.prepare`). Guidance has its usual meaning, v_neg + g * (v_pos - v_neg), so
g = 1 is none. Left out: LoRA loading (the transformer's own adapter methods do it) and samplers of higher order (swap
the scheduler).

Letters: B images, R = 2B rows with guidance (B without), H x W pixels, N steps.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from .. import ops
from ..errors import UserError
from ..models.detailer import AUTO_MEMORY_MB
from ..models.text import encode_prompts
from ..variants import NATIVE_TOKENS, OF_PATCH, SHIFT, nearest_sizes
from . import flow

logger = logging.getLogger(__name__)

COARSE_STRENGTH = 0.6
# On a CPU two rows in one batch save little time and cost their memory, so past this many pixels they go one by one.
_CPU_BATCH_PIXELS = 1024 * 1024
# Working memory of the head, in MB, to try next after running out of memory.
_SMALLER_HEAD_MB = (64.0, 16.0)


def make_scheduler(shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    """The Euler scheduler of L2P; `set_schedule` gives it the sigmas of `flow.sigmas`."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def set_schedule(scheduler, num_steps: int, shift: float | None = None) -> torch.Tensor:
    """Set ``scheduler`` to linspace(1, 0, N + 1), shifted; returns its sigmas (N + 1,) fp32 on the CPU, the last 0.

    ``shift`` None takes the scheduler's configured one. Kept on the CPU, a step never waits for the device.
    """
    shift = scheduler.config.shift if shift is None else shift
    scheduler.set_shift(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1].tolist())
    return scheduler.sigmas


def draw_noise(
    shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """Standard normal noise (B, 3, H, W) fp32, drawn image by image.

    One generator draws the images in turn; a list holds one each, so an image does not depend on its neighbours.
    Without one the CPU's global generator draws: a seed means the same picture on every device.
    """
    batch = shape[0]
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * batch
    if len(generators) != batch:
        raise UserError(f"generator: wanted one or a list of {batch} (one an image), got {len(generators)}")
    return torch.cat(
        [torch.randn((1, *shape[1:]), generator=g, device=g.device if g is not None else "cpu") for g in generators]
    )


def image_to_pixels(image: Any, height: int, width: int) -> torch.Tensor:
    """A picture as (1, 3, H, W) fp32 in [-1, 1], resized to ``height`` x ``width`` (tensors: antialiased bicubic).

    Args:
        image: PIL image (turned upright by its EXIF, alpha dropped), array (H, W, 3) uint8 or float in [0, 1], or
            tensor (3, H, W) or (1, 3, H, W) in [0, 1].
    """
    if isinstance(image, np.ndarray):
        image = image if image.dtype == np.uint8 else (image.clip(0, 1) * 255).round().astype(np.uint8)
        image = PIL.Image.fromarray(image)
    if isinstance(image, PIL.Image.Image):
        image = PIL.ImageOps.exif_transpose(image).convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    else:
        pixels = (image if image.ndim == 4 else image[None]).float() * 2 - 1
        if pixels.shape[:2] != (1, 3):
            raise UserError(f"image: wanted a tensor (3, H, W) in [0, 1], got {tuple(image.shape)}")
        if pixels.shape[-2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels.clamp(-1, 1)


def pixels_to_images(pixels: torch.Tensor, output_type: str) -> Any:
    """Pixels (B, 3, H, W) in [-1, 1] as ``output_type`` asks.

    "pil": a list; "np" (B, H, W, 3) or "pt" (B, 3, H, W): in [0, 1]; "latent": unchanged.
    """
    if output_type == "latent":
        return pixels
    if output_type == "pil":
        return [PIL.Image.fromarray(image) for image in ops.to_uint8(pixels).cpu().numpy()]
    pixels = (pixels / 2 + 0.5).clamp_(0, 1).cpu()
    return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).numpy()


class L2PPipeline(DiffusionPipeline):
    """Text-to-image and image-to-image with an `L2PTransformer2DModel`.

    Args:
        transformer: the L2P model.
        text_encoder: transformers Qwen3 model; None when only ``prompt_embeds`` are used.
        tokenizer: its tokenizer.
        scheduler: `make_scheduler()`; any flow-matching scheduler with ``set_shift`` and ``set_timesteps(sigmas=)``.
        default_steps, default_guidance_scale: what `__call__` takes when not told; None: by the patch size.
        coarse_size: tokens of the longer side of the coarse start (see `__call__`); None: no coarse start.
        coarse_strength: sigma in (0, 1] at which the full-size run takes over from the coarse one.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer,
        text_encoder,
        tokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        default_steps: int | None = None,
        default_guidance_scale: float | None = None,
        coarse_size: int | None = None,
        coarse_strength: float | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            coarse_size=coarse_size,
            coarse_strength=coarse_strength,
        )
        self._interrupt = False
        self._stage = ""
        self._cfg_batched: bool | None = None

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> L2PPipeline:
        """As every diffusers pipeline."""
        from ..models import zimage as model  # noqa: F401  (diffusers takes components only from modules that are imported)

        return super().from_pretrained(*args, **kwargs)

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
        return self.config.default_steps or OF_PATCH[self.patch_size].steps

    @property
    def default_guidance_scale(self) -> float:
        """Guidance scale when `__call__` is not told."""
        scale = self.config.default_guidance_scale
        return OF_PATCH[self.patch_size].guidance_scale if scale is None else scale

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after that step, as in other diffusers pipelines."""
        return self._interrupt

    @property
    def stage(self) -> str:
        """The stage now running: "coarse" or "full"; a callback may ask."""
        return self._stage

    @property
    def cfg_batched(self) -> bool | None:
        """Whether the last run took both halves of guidance as one batch to its end; None: it had no guidance."""
        return self._cfg_batched

    @property
    def _is_euler(self) -> bool:
        """Whether the scheduler's step is the one that `ops.euler_step` fuses with guidance."""
        return type(self.scheduler) is FlowMatchEulerDiscreteScheduler and not self.scheduler.config.stochastic_sampling

    def encode_prompt(self, prompts: Sequence[str], device: torch.device | None = None) -> list[torch.Tensor]:
        """Features (L_i, C) of each prompt; see `text.encode_prompts`."""
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError("this pipeline has no text encoder: load one, or pass (negative_)prompt_embeds")
        return encode_prompts(self.text_encoder, self.tokenizer, prompts, device or self._execution_device)

    def coarse_resolution(self, height: int, width: int, coarse_size: int | None = None) -> tuple[int, int] | None:
        """Height and width in pixels of the coarse start of a ``height`` x ``width`` picture; None: it has none.

        The longer side gets ``coarse_size`` tokens (the pipeline's own by default; 0: no coarse start), the shorter one
        follows the aspect. A picture of no more tokens than that needs no coarse start.
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
        guidance_scale: float | None = None,
        shift: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        image: Any = None,
        strength: float = 0.6,
        prompt_embeds: Sequence[torch.Tensor] | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor] | None = None,
        cfg_batch: bool | str = "auto",
        coarse_size: int | None = None,
        coarse_strength: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[L2PPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures of prompts.

        Args:
            prompt: one prompt or n.
            negative_prompt: what guidance steers away from: one for all, or n.
            height, width: in pixels, multiples of ``size_multiple``; by default the model's own size, or the image's.
            num_inference_steps: N; by default 30 for patch 16, 50 for larger ones, or what the pipeline's config says.
            guidance_scale: g; 1 switches guidance off and halves the work. By default 2.0 for patch 16, 4.0 for larger.
            shift: of the noise schedule; by default the scheduler's (3).
            num_images_per_prompt: B = n times this.
            generator: one drawing the images' noise in turn, or B: then an image does not depend on its neighbours.
            noise: (B, 3, H, W) to use instead of drawing it (that of the full-size stage).
            image: picture to start from (image-to-image); see `image_to_pixels`.
            strength: in (0, 1]: the share of the steps that an image-to-image run takes; 1 ignores the image.
            prompt_embeds, negative_prompt_embeds: n tensors (L_i, C) instead of the prompts.
            cfg_batch: both halves of guidance as one batch: True, False, or "auto" (True until memory forbids).
            coarse_size, coarse_strength: override the config's; ``coarse_size`` 0 switches the coarse start off. With
                it the picture is first sampled small, enlarged, noised to the first sigma <= ``coarse_strength`` and
                finished at full size. Both noises come from the same generator, the coarse one first.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W) in [0, 1], or "latent": the state, about [-1, 1].
            return_dict: False returns a tuple with the pictures.
            callback_on_step_end: called with the pipeline, the step (counted over both stages), its timestep in
                [0, 1000] and {"latents": state}; it may return {"latents": a new state}.

        Returns:
            `ImagePipelineOutput` whose ``images`` is a list or an array of B.

        Raises:
            UserError: an argument out of range; the message says what is valid.
            torch.OutOfMemoryError: not even one image at a time with the narrowest bands fits.
        """
        prompts, negatives = self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        guidance = self.default_guidance_scale if guidance_scale is None else guidance_scale
        coarse_strength = coarse_strength or self.config.coarse_strength or COARSE_STRENGTH
        height, width = self._check_size(height, width, image)
        self._check_numbers(steps, guidance, shift, strength, coarse_strength, num_images_per_prompt)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        if cfg_batch not in (True, False, "auto"):
            raise UserError(f"cfg_batch must be True, False or 'auto', got {cfg_batch!r}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(f"a callback can be given {self._callback_tensor_inputs}, not {sorted(unknown)}")

        device = self._execution_device
        self._interrupt, self._cfg_batched = False, None
        guided = guidance != 1
        if prompt_embeds is None:
            texts = prompts + (negatives if guided and negative_prompt_embeds is None else [])
            features = self.encode_prompt(texts, device)
            prompt_embeds, rest = features[: len(prompts)], features[len(prompts) :]
        else:
            rest = self.encode_prompt(negatives, device) if guided and negative_prompt_embeds is None else []
        negative_prompt_embeds = (rest if negative_prompt_embeds is None else negative_prompt_embeds) if guided else []
        caps = [
            [cap.to(device, self.transformer.dtype) for cap in half for _ in range(num_images_per_prompt)]
            for half in (prompt_embeds, negative_prompt_embeds)
        ]
        batch = len(caps[0])
        if guided and len(caps[1]) != batch:
            raise UserError(f"negative prompts: wanted 1 or {len(prompt_embeds)}, got {len(negative_prompt_embeds)}")
        if noise is not None and tuple(noise.shape) != (batch, 3, height, width):
            raise UserError(f"noise: wanted a shape of {(batch, 3, height, width)}, got {tuple(noise.shape)}")

        sigmas = set_schedule(self.scheduler, steps, shift)
        first, coarse = 0, None
        if image is not None:
            first = min(steps - 1, int(steps - steps * strength))
        elif coarse := self.coarse_resolution(height, width, coarse_size):
            # 0.6 is not exactly 0.6 in fp32
            first = min(steps - 1, int((sigmas > coarse_strength + 1e-6).sum()))
            coarse = coarse if first else None  # at sigma 1 nothing of a coarse picture would be left

        def run(pixels: torch.Tensor, begin: int, done: int, bar) -> torch.Tensor:
            self._stage = "coarse" if coarse and not done else "full"
            size = f"{pixels.shape[3]}x{pixels.shape[2]}"
            bar.set_description(f"{self._stage} {size}" if coarse else size)
            predict = _Predictor(self.transformer, *caps, pixels, 1 - sigmas[:-1], cfg_batch)
            set_schedule(self.scheduler, steps, shift)  # a scheduler counts its own steps: begin anew
            self.scheduler.set_begin_index(begin)
            for i in range(begin, steps):
                if self._interrupt:
                    break
                t = self.scheduler.timesteps[i]
                raw, negative = predict(pixels, i)
                if self._is_euler:
                    # a callback may keep the states it is given
                    step = ops.euler_step_ if callback_on_step_end is None else ops.euler_step
                    pixels = step(pixels, raw, float(sigmas[i + 1] - sigmas[i]), negative, guidance)
                else:
                    v = flow.velocity(raw.float())
                    if negative is not None:
                        v = flow.guide(v, flow.velocity(negative.float()), guidance)
                    pixels = self.scheduler.step(v, t, pixels, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: pixels for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, done + i - begin, t, tensors)
                    pixels = (returned or {}).get("latents", pixels).float()
                bar.update()
            self._cfg_batched = predict.cfg_batched
            return pixels

        with self.progress_bar(total=steps - first + (steps if coarse else 0)) as bar:
            start = None
            if image is not None:
                start = self._check_images(image, batch, height, width)
            elif coarse:
                start = run(draw_noise((batch, 3, *coarse), generator).to(device), 0, 0, bar)
                start = F.interpolate(start.clamp_(-1, 1), (height, width), mode="bicubic")
            given = noise is not None  # not ours to write over
            if noise is None:
                noise = draw_noise((batch, 3, height, width), generator)
            pixels = noise.to(device, torch.float32, copy=given)
            if start is not None:
                pixels = flow.add_noise(start.to(device), pixels, float(sigmas[first]))
            del start, noise
            pixels = run(pixels, first, steps if coarse else 0, bar)

        images = pixels_to_images(pixels, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_embeds) -> tuple[list[str], list[str]]:
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

    def _check_size(self, height: int | None, width: int | None, image: Any) -> tuple[int, int]:
        multiple = self.size_multiple
        own = [NATIVE_TOKENS * self.patch_size] * 2
        if image is not None:
            one = image[0] if isinstance(image, (list, tuple)) else image
            if not isinstance(one, (PIL.Image.Image, np.ndarray, torch.Tensor)):
                raise UserError(f"image: wanted a PIL image, an array or a tensor, got {type(one).__name__}")
            if isinstance(one, PIL.Image.Image):
                size = PIL.ImageOps.exif_transpose(one).size[::-1]
            else:
                size = one.shape[:2] if isinstance(one, np.ndarray) else one.shape[-2:]
            own = [max(multiple, round(side / multiple) * multiple) for side in size]
        height, width = own[0] if height is None else height, own[1] if width is None else width
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value < 1 or value % multiple:
                near = nearest_sizes(max(int(value), 1), multiple)
                raise UserError(f"{name} must be a multiple of {multiple} for this checkpoint, got {value}; try {near}")
        return height, width

    @staticmethod
    def _check_numbers(steps, guidance, shift, strength, coarse_strength, images_per_prompt) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"num_inference_steps must be a whole number of at least 1, got {steps}")
        if not 0 <= guidance < float("inf"):
            raise UserError(f"guidance_scale must be at least 0 (1: no guidance), got {guidance}")
        if shift is not None and not 0 < shift < float("inf"):
            raise UserError(f"shift must be positive, got {shift}; {SHIFT:g} is the published value")
        for name, value in (("strength", strength), ("coarse_strength", coarse_strength)):
            if not 0 < value <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, got {value}; try {min(max(value, 0.1), 1.0):g}")
        if images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt must be at least 1, got {images_per_prompt}")

    @staticmethod
    def _check_images(image: Any, batch: int, height: int, width: int) -> torch.Tensor:
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if len(images) not in (1, batch):
            raise UserError(f"image: wanted 1 or {batch}, got {len(images)}")
        pixels = torch.cat([image_to_pixels(one, height, width) for one in images])
        return pixels.expand(batch, -1, -1, -1)


class _Predictor:
    """The network's predictions of one stage, and how to go on when memory runs out.

    Rows are the B positive samples, then the B negative ones. `rows_at_once` of them run as a batch: R, B, or one.
    Out of memory, the head's bands get narrower first (that costs little time), then fewer rows run at once.
    """

    def __init__(self, transformer, caps, negative_caps, pixels: torch.Tensor, timesteps, cfg_batch):
        self.transformer = transformer
        self.caps = [*caps, *negative_caps]
        self.batch, _, self.height, self.width = pixels.shape
        self.timesteps = timesteps.to(pixels.device)
        self.forced = cfg_batch is True
        self.rows_at_once = len(self.caps)
        on_cpu = pixels.device.type == "cpu"
        if cfg_batch is False or (cfg_batch == "auto" and on_cpu and self.height * self.width > _CPU_BATCH_PIXELS):
            self.rows_at_once = self.batch
        self.conditions: dict[int, Any] = {}

    @property
    def cfg_batched(self) -> bool | None:
        return None if len(self.caps) == self.batch else self.rows_at_once == len(self.caps)

    def __call__(self, pixels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raw outputs (B, 3, H, W) at ``step`` of the schedule: of the prompts, and of the negative ones if any."""
        while True:
            try:
                return self._raw(pixels, step)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or not self._retreat():
                    raise
            gc.collect()  # outside the handler: the exception's frames held the tensors
            if pixels.is_cuda:
                torch.cuda.empty_cache()

    def _raw(self, pixels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        raw = []
        for start in range(0, len(self.caps), self.rows_at_once):
            rows = range(start, min(start + self.rows_at_once, len(self.caps)))
            if start not in self.conditions:
                with _awake(self.transformer):
                    self.conditions[start] = self.transformer.prepare(
                        self.caps[rows.start : rows.stop], self.height, self.width, timesteps=self.timesteps
                    )
            samples = [row % self.batch for row in rows]
            x = pixels if samples == list(range(self.batch)) else pixels[samples]
            t = self.timesteps[step].expand(len(rows))
            raw.append(self.transformer(x, t, cond=self.conditions[start], step=step))
        if len(raw) > len(self.caps) // self.batch:  # row by row
            raw = [torch.cat(raw)]
        halves = raw[0].split(self.batch) if len(raw) == 1 else raw
        return halves[0], halves[1] if len(halves) > 1 else None

    def _retreat(self) -> bool:
        """Choose a smaller way of running and say so; False: there is none."""
        head = getattr(self.transformer, "local_decoder", None)
        now = getattr(head, "memory_mb", None) or AUTO_MEMORY_MB
        if head is not None and (smaller := next((mb for mb in _SMALLER_HEAD_MB if mb < now), None)):
            head.memory_mb, head.band_rows = smaller, None  # kept for later runs: they would run out as well
            logger.warning("out of memory: retrying with head bands of %g MB", smaller)
        elif self.rows_at_once > self.batch and not self.forced:
            self._run_at_once(self.batch)
            logger.warning("out of memory: retrying with the two halves of guidance one after the other")
        elif self.rows_at_once > 1 and not self.forced:
            self._run_at_once(1)
            logger.warning("out of memory: retrying with one image at a time")
        else:
            return False
        return True

    def _run_at_once(self, rows: int) -> None:
        self.rows_at_once = rows
        self.conditions.clear()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextlib.contextmanager
def _awake(module: torch.nn.Module) -> Iterator[None]:
    """Run an offloaded module's hook around a method other than ``forward``, which alone the hook would see."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def load_pipeline(
    model: str | os.PathLike, text_encoder: str | os.PathLike | None = None, torch_dtype: torch.dtype | None = None
) -> L2PPipeline:
    """Load a pipeline folder, or a checkpoint (file, shards or transformer folder) with a text encoder beside it.

    Args:
        model: path. A pipeline folder has a ``model_index.json``.
        text_encoder: folder or hub id with subfolders ``text_encoder`` and ``tokenizer``, such as
            Tongyi-MAI/Z-Image-Turbo; needed unless ``model`` is a pipeline folder.
        torch_dtype: of transformer and text encoder; None: as the transformer is stored (`Checkpoint.default_dtype`).

    Raises:
        UserError: a file that can't be used, or no text encoder.
    """
    from ..loading import load_model, load_text_encoder

    model = os.fspath(model)
    is_pipeline = os.path.isfile(os.path.join(model, "model_index.json"))
    if not is_pipeline and text_encoder is None:
        raise UserError(f"{model} holds no text encoder; name one as well, for example Tongyi-MAI/Z-Image-Turbo")
    transformer = load_model(os.path.join(model, "transformer") if is_pipeline else model, dtype=torch_dtype)
    encoder, tokenizer = load_text_encoder(model if text_encoder is None else text_encoder, transformer.dtype)
    components = {"transformer": transformer, "text_encoder": encoder, "tokenizer": tokenizer}
    if not is_pipeline:
        return L2PPipeline(scheduler=make_scheduler(), **components)
    try:  # what is left to read is the scheduler and the defaults
        return L2PPipeline.from_pretrained(model, local_files_only=True, **components)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"can't load the pipeline folder {model}: {str(error).splitlines()[0]}") from error
