"""What every pixel model is, whatever its transformer: patches of pixels -> transformer -> Detailer Head.

`PixelModel` is the contract that sampling, training, quantizing and planning go by; none of them names an attribute of
one model. `DiffusersPixelModel` makes such a model of a transformer class of diffusers, as it is: its input
projection takes patches of pixels, its last norm and projection are dropped. One file each beside this one says how
that class is called.

B batch, D model width, P patch, h x w token grid, N = h w image tokens, L text tokens of width C.

The text features of a prompt are one tensor (L, C). A pooled vector, where a source has one, is the first row of it
(`pack_text`), so whatever keeps, moves or drops texts need not know of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..formats.checkpoint import Checkpoint
from ..formats.shapes import HEAD
from ..ops import patchify
from ..variants import OF_PATCH, SOURCES
from .detailer import DetailerHead, Settled
from .text import Encoders


def cut(x: Tensor, windows: Sequence[tuple[int, int, int, int]], unit: int = 1) -> Tensor:
    """Of each sample of ``x`` (B, C, H, W) its box (row, column, height, width), counted in ``unit`` values."""
    boxes = [[unit * value for value in box] for box in windows]
    return torch.stack([part[:, r : r + h, c : c + w] for part, (r, c, h, w) in zip(x, boxes, strict=True)])


class PixelModel:
    """The contract. A mixin before diffusers' classes; offers what is the same for all models.

    Attributes:
        pixel_parts: prefixes of the parameters that a latent model has not: patch embedding and head.
        stacks: names of the main stacks of blocks, in order of execution.
        biased: whether attention is given a bias or a mask, which not every backend takes.
        packs_rows: whether rows of different lengths are attended each over its own tokens, without a mask.
        source: its row in `variants.SOURCES`.
        held: how many tensors of the tokens' size a block holds at once while an image is drawn.
        of_time: what the names of a block's layers for the timestep hold; they see a row a sample, not its tokens.
    """

    source: str
    held = 10.0  # input, norm, and a feed-forward of four times the width before and after its activation
    of_time: tuple[str, ...] = ("norm", "mod")

    pixel_parts: tuple[str, ...] = (HEAD,)
    stacks: tuple[str, ...] = ()
    biased = False
    packs_rows = False

    @classmethod
    def from_single_file(
        cls, path, torch_dtype: torch.dtype | None = None, device: torch.device | str = "cpu", **config
    ) -> PixelModel:
        """Load a checkpoint of any layout (see `Checkpoint`), in evaluation mode. ``config`` overrides arguments.

        Every parameter is read straight into ``torch_dtype`` (None: `Checkpoint.default_dtype`) on ``device``.

        Raises:
            UserError: not a checkpoint, damaged, or of another model.
        """
        checkpoint = Checkpoint(path)
        if checkpoint.layout.source.class_name != cls.__name__:
            raise UserError(f"{path} is of {checkpoint.layout.source.title}, whose class is another; use load_model")
        model = empty(cls, checkpoint.l2p_config(**config))
        checkpoint.fill(model, torch_dtype, device)
        return model.eval()

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        raise NotImplementedError

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of: the patch, but 320 for patch 160."""
        return OF_PATCH[self.patch_size].size_multiple

    @property
    def head(self) -> DetailerHead:
        """What turns the transformer's features into pixels."""
        return self.local_decoder

    @property
    def width(self) -> int:
        """D."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        raise NotImplementedError

    @property
    def text_width(self) -> int:
        """Width of a row of text features."""
        raise NotImplementedError

    @property
    def idle(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that no output depends on: they are never trained."""
        return ()

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that are read."""
        return self.config.get("text_tokens") or SOURCES[self.source].text_tokens

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(dotted name, block) of every transformer block, in order of execution.

        Freezing, sharding, checkpointing, quantizing and memory planning go by this and name no attribute of one model.
        """
        for stack in self.stacks:
            for i, block in enumerate(getattr(self, stack)):
                yield f"{stack}.{i}", block

    def main_blocks(self) -> list[str]:
        """Names of the blocks whose first and last n are trained, in order of execution."""
        return [name for name, _ in self.blocks() if name.rpartition(".")[0] in self.stacks]

    def block_tokens(self, image: int, text: int) -> list[int]:
        """How many tokens each of `blocks` sees of ``image`` and ``text`` tokens."""
        return [image + text for _ in self.blocks()]

    def small(self) -> PixelModel:
        """A small model of the same class, each kind of block once and heads as wide, to measure blocks on."""
        raise NotImplementedError

    def prepare(self, cap_feats: Sequence[Tensor], height: int, width: int, timesteps: Tensor | None = None) -> Any:
        """Compute once what the steps of a run share; `forward` takes it as ``cond``.

        It is a dataclass with ``head``, which is `settle_head`'s, and a method ``at(step)``: what one step is given,
        such that it is step 0.
        """
        raise NotImplementedError

    def settle_head(self, samples: int, height: int, width: int, timesteps: Tensor | None) -> Settled | None:
        """How the head runs all steps of a run.

        None without timesteps, or where offloading or sharding has yet to bring the weights: each call finds out for
        itself.
        """
        weight = self.head.out_conv.weight
        if timesteps is None or weight.device != timesteps.device or type(weight) not in (nn.Parameter, Tensor):
            return None
        return self.head.settle(weight.new_empty(()).expand(samples, 3, height, width), self.dtype)

    def features(
        self,
        pixels: Tensor,
        t: Tensor | None = None,
        cap_feats: Sequence[Tensor] | None = None,
        *,
        cond: Any = None,
        step: int | None = None,
    ) -> Tensor:
        """What the transformer hands to the Detailer Head: (B, D, h, w), channels-last; arguments as `forward`'s."""
        raise NotImplementedError

    def forward(
        self,
        pixels: Tensor,
        t: Tensor | None = None,
        cap_feats: Sequence[Tensor] | None = None,
        *,
        cond: Any = None,
        step: int | None = None,
        windows: Sequence[tuple[int, int, int, int]] | None = None,
    ) -> Tensor:
        """The raw prediction x0 - eps.

        Args:
            pixels: (B, 3, H, W) noisy image, range about [-1, 1], any floating dtype.
            t: (B,) model time 1 - sigma in [0, 1]; not needed with ``step``, but with ``x0_floor`` or ``read_mean``.
            cap_feats: B tensors (L_i, C), text features without padding; not needed with ``cond``.
            cond: `prepare` of the same texts and size, to reuse what does not depend on the step.
            step: index into the timesteps that ``cond`` was prepared with.
            windows: B boxes (row, column, height, width) of one size in tokens: the head runs on these parts of the
                images alone (with zeros around them), to train a head for large images in little memory.

        Returns:
            (B, 3, H, W) in the model's dtype; with ``windows``, of their size.

        Raises:
            UserError: sizes, counts or widths that don't fit the model or each other.
        """
        features = self.features(pixels, t, cap_feats, cond=cond, step=step)
        if windows is not None:
            pixels, features = cut(pixels, windows, self.patch_size), cut(features, windows)
        out = self.head(pixels, features, settled=None if cond is None else cond.head)
        if self.config.x0_floor is not None:  # x = x0 - sigma (x0 - eps)
            sigma = (1 - t.to(out.device, torch.float32)).clamp(min=self.config.x0_floor).view(-1, 1, 1, 1)
            out = (out - pixels.to(out.dtype)) / sigma.to(out.dtype)
        return out

    @staticmethod
    def encode(encoders: Encoders, prompts: Sequence[str], device: torch.device, max_tokens: int) -> list[Tensor]:
        """Text features (L_i, C) of prompts by the source's text encoders, as its own pipeline makes them."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size that the model can't draw."""
        step = self.size_multiple
        if height < 1 or width < 1 or height % step or width % step:
            near = [max(1, round(n / step)) * step for n in (height, width)]
            raise UserError(
                f"height and width must be multiples of {step} for this model, got {height} x {width}; "
                f"try {near[0]} x {near[1]}"
            )

    def check_texts(self, cap_feats: Sequence[Tensor], fewest: int = 1) -> None:
        """Refuse text features of another model, and texts of fewer than ``fewest`` rows."""
        width = self.text_width
        if not len(cap_feats):
            raise UserError("cap_feats must hold one tensor of text features per sample, got none")
        for i, features in enumerate(cap_feats):
            if features.ndim != 2 or features.shape[1] != width or len(features) < fewest:
                raise UserError(
                    f"cap_feats[{i}] must be (at least {fewest}, {width}) text features, got {tuple(features.shape)}"
                )

    def check_batch(self, pixels: Tensor, samples: int, size: tuple[int, int]) -> None:
        """Refuse pixels that are no batch of images, or not what the conditioning was prepared for."""
        batch, channels, *sides = pixels.shape if pixels.ndim == 4 else (0, 0)
        if channels != 3 or batch == 0:
            raise UserError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
        if samples != batch or size != tuple(sides):
            raise UserError(
                f"the text conditioning is for {samples} samples of {size[0]} x {size[1]}, "
                f"pixels are {batch} of {sides[0]} x {sides[1]}"
            )


def empty(kind: type[PixelModel], config: Mapping[str, Any]) -> PixelModel:
    """The model of ``config`` on the meta device: shapes, no memory.

    Raises:
        UserError: the constructor refuses ``config``.
    """
    try:
        with torch.device("meta"):
            return kind(**config)
    except (UserError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no L2P model has the sizes that these tensors tell: {reason}") from error


def pack_text(sequence: Tensor, pooled: Tensor) -> Tensor:
    """A text's (L, C) and its pooled vector (C') as one tensor (1 + L, max(C, C')): the vector is the first row."""
    width = max(sequence.shape[1], len(pooled))
    rows = F.pad(pooled[None], (0, width - len(pooled))), F.pad(sequence, (0, width - sequence.shape[1]))
    return torch.cat([rows[0].to(sequence.dtype), rows[1]])


@dataclass
class TextBatch:
    """What a run's steps share, made by `DiffusersPixelModel.prepare` for B samples of one size.

    Attributes:
        text: (B, L, C), zeros where a text is shorter.
        mask: (B, L), true where there is text; None where all texts have L tokens.
        pooled: (B, C'); None: the source has none.
        size: (height, width) in pixels.
        times: (steps,) model times; None where they were not given.
        head: how the head runs the steps; None: each finds out for itself.
    """

    text: Tensor
    mask: Tensor | None
    pooled: Tensor | None
    size: tuple[int, int]
    times: Tensor | None
    head: Settled | None = None

    def at(self, step: int) -> TextBatch:
        """What one step is given, such that it is step 0."""
        return replace(self, times=self.times[step : step + 1])

    def joint_mask(self, image: int, text_first: bool = True) -> Tensor | None:
        """(B, 1, 1, L + image): which keys attention sees; None: all."""
        if self.mask is None:
            return None
        parts = [self.mask, self.mask.new_ones(len(self.mask), image)]
        return torch.cat(parts if text_first else parts[::-1], dim=1)[:, None, None]


class First(nn.Module):
    """In the place of a norm that is dropped: hands on its first argument."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class DiffusersPixelModel(PixelModel):
    """A transformer class of diffusers between patches of pixels and the Detailer Head; a mixin before that class.

    A subclass calls the class's own constructor with 3 P^2 input channels, then `become_pixels`, and has `run_body`.
    Parameters keep the names of the source, so its checkpoints, LoRAs, caches and hooks fit. Time, position ids and
    texts are what diffusers' pipeline of the source hands to the class.
    """

    ignore_for_config = ["in_channels", "out_channels"]  # of the class below: 3 P^2, and nothing

    def become_pixels(self) -> None:
        """Drop the last norm and projection, and put the Detailer Head on top."""
        self.norm_out, self.proj_out = First(), nn.Identity()
        self.local_decoder = DetailerHead(self.patch_size, self.width, self.config.head_width)

    def run_body(self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, cond: TextBatch) -> Tensor:
        """The class's forward pass: (B, N, 3 P^2) patches of a ``grid`` at noise levels (B,) -> (B, N, D)."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int:
        return self.config.pixel_patch_size

    @property
    def width(self) -> int:
        return self.config.num_attention_heads * self.config.attention_head_dim

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def text_width(self) -> int:
        return max(self.config.joint_attention_dim, self.pooled_width)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector; 0: none."""
        return self.config.get("pooled_projection_dim") or 0

    def small(self) -> PixelModel:
        names = inspect.signature(type(self).__init__).parameters
        config = {name: self.config[name] for name in names if name != "self"}
        config |= {"num_attention_heads": 2, "joint_attention_dim": 8, "num_layers": 1, "head_width": 0.05}
        config |= {name: one for name, one in self.small_config.items() if name in config}
        return type(self)(**config)

    small_config: dict[str, Any] = {"num_single_layers": 1, "pooled_projection_dim": 8}

    def prepare(
        self, cap_feats: Sequence[Tensor], height: int, width: int, timesteps: Tensor | None = None
    ) -> TextBatch:
        """The texts of B samples as one batch. What else a step needs the class computes itself, for little.

        Args:
            cap_feats: B tensors (L_i, C) of text features; with a pooled vector as `pack_text` has it.
            height, width: size of the images in pixels.
            timesteps: (steps,) model times 1 - sigma of the run; `forward` then takes ``step`` instead of ``t``.

        Raises:
            UserError: a size that is no multiple of `size_multiple`, no texts, an empty text, a wrong feature width.
        """
        self.check_size(height, width)
        pooled, wide = None, self.pooled_width
        self.check_texts(cap_feats, 2 if wide else 1)
        if timesteps is not None and timesteps.ndim != 1:
            raise UserError(f"timesteps must be (steps,), got {tuple(timesteps.shape)}")
        if wide:
            pooled = torch.stack([text[0, :wide] for text in cap_feats])
            cap_feats = [text[1:] for text in cap_feats]
        lengths = torch.tensor([len(text) for text in cap_feats])
        text = nn.utils.rnn.pad_sequence(list(cap_feats), batch_first=True)[..., : self.config.joint_attention_dim]
        mask = None
        if (lengths != lengths[0]).any():
            mask = (torch.arange(text.shape[1]) < lengths[:, None]).to(text.device)
        head = self.settle_head(len(text), height, width, timesteps)
        return TextBatch(text, mask, pooled, (height, width), timesteps, head)

    def features(
        self,
        pixels: Tensor,
        t: Tensor | None = None,
        cap_feats: Sequence[Tensor] | None = None,
        *,
        cond: TextBatch | None = None,
        step: int | None = None,
    ) -> Tensor:
        if cond is None:
            if cap_feats is None:
                raise UserError("the model needs cap_feats, or cond = prepare(cap_feats, height, width)")
            self.check_batch(pixels, len(cap_feats), tuple(pixels.shape[2:]))
            cond = self.prepare(cap_feats, *pixels.shape[2:])
        batch = len(cond.text)
        self.check_batch(pixels, batch, cond.size)
        if step is not None:
            steps = 0 if cond.times is None else len(cond.times)
            if not 0 <= step < steps:
                raise UserError(f"step must be one of the {steps} timesteps given to prepare, got {step}")
            t = cond.times[step].expand(batch)
        elif t is None or t.shape != (batch,):
            raise UserError(f"t must be ({batch},), one per sample, got {None if t is None else tuple(t.shape)}")
        dtype, device = self.embedder.weight.dtype, pixels.device
        cond = replace(
            cond,
            text=cond.text.to(device, dtype),
            mask=None if cond.mask is None else cond.mask.to(device),
            pooled=None if cond.pooled is None else cond.pooled.to(device, dtype),
        )
        grid = cond.size[0] // self.patch_size, cond.size[1] // self.patch_size
        patches = patchify(pixels, self.patch_size, dtype=dtype)
        x = self.run_body(patches, grid, 1 - t.to(device, torch.float32), cond)
        return x.unflatten(1, grid).permute(0, 3, 1, 2)  # channels-last as it stands

    @property
    def embedder(self) -> nn.Linear:
        """Patches -> tokens."""
        return self.x_embedder

    def enable_cache(self, config: Any) -> None:
        """As `models.zimage.L2PTransformer2DModel.enable_cache`."""
        from .caches import check_cache, watch_last_block

        name = check_cache(config)
        super().enable_cache(config)
        if name == "FirstBlockCache":
            *_, (_, last) = self.blocks()
            watch_last_block(last)


def grid_ids(grid: tuple[int, int], axes: int, device: torch.device) -> Tensor:
    """(N, axes) position ids: 0, row, column, and zeros."""
    h, w = grid
    ids = torch.zeros(h, w, axes, device=device)
    ids[..., 1] = torch.arange(h, device=device)[:, None]
    ids[..., 2] = torch.arange(w, device=device)
    return ids.flatten(0, 1)
