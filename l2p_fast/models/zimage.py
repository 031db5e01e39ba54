"""The L2P model: patches of pixels -> Z-Image's transformer -> Detailer Head.

B batch, D model width, E head width, P patch, h x w token grid, L text tokens, N image and text tokens of one sample.

A sample's sequence is its image tokens, then its text tokens, each filled up to a multiple of 32 with a learned token
that is attended like any other. All samples of a batch share the image grid, so only texts differ in length: what makes
a batch of them rectangular stands at the end and is never attended (`Keys`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..errors import UserError
from ..formats.shapes import PIXEL_PARTS
from ..ops import patchify
from ..variants import OF_PATCH
from .attention import Ragged
from .blocks import (
    ADALN_DIM,
    ALL_KEYS,
    SEQUENCE_MULTIPLE,
    Keys,
    Linear,
    RMSNorm,
    Rope,
    TimestepEmbedder,
    TransformerBlock,
    rope_tables,
)
from .detailer import DetailerHead, Settled
from .pixel import PixelModel
from .text import Encoders, encode_prompts


@dataclass
class Conditioning:
    """What a run's steps share, made by `L2PTransformer2DModel.prepare` for B samples of one size.

    Attributes:
        text: (B, L, D) refined text tokens.
        rope_image: RoPE of the image tokens.
        rope_joint: RoPE of image and text tokens.
        keys: what attention sees of image and text tokens.
        size: (height, width) in pixels.
        modulations: for each modulated block (steps, 4 D); None where the timesteps were not given.
        head: how the head runs the steps; None: each finds out for itself.
    """

    text: Tensor
    rope_image: Rope
    rope_joint: Rope
    keys: Keys
    size: tuple[int, int]
    modulations: list[Tensor] | None = None
    head: Settled | None = None

    def at(self, step: int) -> Conditioning:
        """What one step is given, such that it is step 0."""
        return replace(self, modulations=[rows[step : step + 1] for rows in self.modulations])


class L2PTransformer2DModel(PixelModel, ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin, CacheMixin):
    """The pixel-space diffusion transformer of L2P (arXiv 2605.12013). The defaults are the published 1K model.

    Args:
        all_patch_size: one patch size: 16 (1K), 64 (4K), 128 (8K) or 160 (10K). It chooses the head.
        all_f_patch_size: always (1,).
        in_channels: always 3.
        dim: model width D.
        n_layers, n_refiner_layers: joint blocks; blocks of each of the two refiners (image, text).
        n_heads, n_kv_heads: attention heads; both the same.
        norm_eps: epsilon of the norms.
        qk_norm: normalize queries and keys per head.
        cap_feat_dim: width of the text features.
        rope_theta, axes_dims, axes_lens: RoPE base, head channels per axis (text, row, column) and positions that the
            published model saw on each. Positions beyond them are computed, not refused.
        t_scale: the timestep embedder sees t * t_scale.
        head_width: multiplies the Detailer Head's channels.
        rope_grid: with a number, every token grid is mapped onto the positions of a ``rope_grid`` x ``rope_grid`` one
            (centred, aspect kept), and image keys get the logit bias log(rope_grid^2 / (h w)) beside text, so that a
            model trained on that grid can run on any. None (published): rows and columns are their own positions.
        x0_floor: with a number, the head gives the clean image x0, and `forward` makes x0 - eps of it, dividing by
            sigma, or by this where sigma is smaller: a small head then need not carry the noise through (Li and He
            2025, arXiv 2511.13720). None (published): the head gives x0 - eps.
        read_mean: with a number, the transformer reads every image on its ``rope_grid``: reduced to it by means over
            squares, and, as a mean holds less noise, scaled and timed as the flow of the smaller image; the head gets
            the features enlarged. The number is the side in pixels of the squares whose mean the patch embedding takes
            itself. None (published): it reads the image as it is.

    Raises:
        UserError: a configuration that no L2P model has.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["t_embedder", "cap_embedder", "norm"]
    # Small or sensitive linears: for `llm_int8_skip_modules` and the like. The head's convolutions are never quantized.
    quantization_skip_modules = ["t_embedder", "cap_embedder", "all_x_embedder", "adaLN_modulation"]
    pixel_parts = PIXEL_PARTS
    source = "zimage"
    stacks = ("layers",)
    packs_rows = True
    of_time = ("adaLN_modulation",)
    held = 2 + 3 * 8 / 3  # input, norm, and the feed-forward's inner tensors with what makes the second

    @register_to_config
    def __init__(
        self,
        all_patch_size: Sequence[int] = (16,),
        all_f_patch_size: Sequence[int] = (1,),
        in_channels: int = 3,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: Sequence[int] = (32, 48, 48),
        axes_lens: Sequence[int] = (1024, 512, 512),
        head_width: float = 1.0,
        rope_grid: int | None = None,
        x0_floor: float | None = None,
        read_mean: int | None = None,
    ):
        super().__init__()
        if read_mean is not None and rope_grid is None:
            raise UserError(f"read_mean = {read_mean} needs a rope_grid, got none")
        if len(all_patch_size) != 1 or all_patch_size[0] not in OF_PATCH:
            raise UserError(f"all_patch_size must hold one of {sorted(OF_PATCH)}, got {list(all_patch_size)}")
        if list(all_f_patch_size) != [1] or in_channels != 3:
            given = f"{list(all_f_patch_size)} and {in_channels}"
            raise UserError(f"an L2P model has all_f_patch_size [1] and in_channels 3, got {given}")
        if n_kv_heads != n_heads:
            raise UserError(f"n_kv_heads must equal n_heads = {n_heads}, got {n_kv_heads}")
        if dim != n_heads * sum(axes_dims) or any(d % 2 for d in axes_dims):
            raise UserError(
                f"axes_dims must be even and sum up to dim / n_heads = {dim / n_heads:g}, got {list(axes_dims)}"
            )
        patch = all_patch_size[0]
        self.gradient_checkpointing = False

        def blocks(count: int, modulation: bool) -> nn.ModuleList:
            return nn.ModuleList(TransformerBlock(dim, n_heads, norm_eps, qk_norm, modulation) for _ in range(count))

        self.all_x_embedder = nn.ModuleDict({f"{patch}-1": Linear(patch * patch * in_channels, dim)})
        self.noise_refiner = blocks(n_refiner_layers, modulation=True)
        self.context_refiner = blocks(n_refiner_layers, modulation=False)
        self.t_embedder = TimestepEmbedder(min(dim, ADALN_DIM))
        self.cap_embedder = nn.Sequential(RMSNorm(cap_feat_dim, norm_eps), Linear(cap_feat_dim, dim))
        self.x_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.layers = blocks(n_layers, modulation=True)
        self.local_decoder = DetailerHead(patch, dim, head_width)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.all_patch_size[0]

    @property
    def width(self) -> int:
        return self.config.dim

    @property
    def heads(self) -> int:
        return self.config.n_heads

    @property
    def text_width(self) -> int:
        return self.config.cap_feat_dim

    @property
    def biased(self) -> bool:
        return self.config.rope_grid is not None

    def blocks(self) -> Iterator[tuple[str, TransformerBlock]]:
        """(dotted name, block) of every transformer block, in order of execution: the refiners are no main stack."""
        for stack in ("noise_refiner", "context_refiner", "layers"):
            for i, block in enumerate(getattr(self, stack)):
                yield f"{stack}.{i}", block

    def block_tokens(self, image: int, text: int) -> list[int]:
        """How many tokens each of `blocks` sees of ``image`` and ``text`` tokens."""
        stacks = (self.noise_refiner, image), (self.context_refiner, text), (self.layers, image + text)
        return [count for stack, count in stacks for _ in stack]

    def small(self) -> L2PTransformer2DModel:
        heads, per_head = 2, self.config.axes_dims
        return L2PTransformer2DModel(
            dim=heads * sum(per_head), n_heads=heads, n_kv_heads=heads, axes_dims=per_head, n_layers=1,
            n_refiner_layers=1, cap_feat_dim=8, head_width=0.05,
        )  # fmt: skip

    @property
    def modulated_blocks(self) -> list[TransformerBlock]:
        """The blocks that the timestep modulates, in the order of `Conditioning.modulations`."""
        return [block for _, block in self.blocks() if block.modulation]

    def enable_cache(self, config) -> None:
        """Skip work of the joint blocks (``layers``) that hardly changes between steps, by diffusers' hooks.

        Each call must stand in a `cache_context`, whose name tells apart what must not mix: sizes, rows of a batch.

        Args:
            config: diffusers' ``FirstBlockCacheConfig``, ``MagCacheConfig``, ``PyramidAttentionBroadcastConfig`` or
                ``TaylorSeerCacheConfig`` (which by default predicts the attention of each block).

        Raises:
            UserError: a cache that doesn't fit this model.
        """
        from .caches import check_cache, register_block

        if check_cache(config) == "TaylorSeerCache" and not config.cache_identifiers:
            config = replace(config, cache_identifiers=[r"layers\.\d+\.attention"])
        register_block(TransformerBlock, image=0)
        super().enable_cache(config)

    def features(
        self,
        pixels: Tensor,
        t: Tensor | None = None,
        cap_feats: Sequence[Tensor] | None = None,
        *,
        cond: Conditioning | None = None,
        step: int | None = None,
    ) -> Tensor:
        """What the transformer hands to the Detailer Head: (B, D, h, w), channels-last; arguments as `forward`'s."""
        if cond is None:
            if cap_feats is None:
                raise UserError("the model needs cap_feats, or cond = prepare(cap_feats, height, width)")
            self.check_batch(pixels, len(pixels), tuple(pixels.shape[2:]))
            cond = self._prepare(cap_feats, *pixels.shape[2:])
        self.check_batch(pixels, cond.text.shape[0], cond.size)
        batch, _, height, width = pixels.shape
        reduced = self.config.read_mean is not None
        if step is None or reduced or self.config.x0_floor is not None:
            if t is None or t.shape != (batch,):
                raise UserError(f"t must be ({batch},), one per sample, got {None if t is None else tuple(t.shape)}")
        whole, (height, width) = (height, width), self._read_size(height, width)
        if reduced:
            noise, t = self._as_read(t.to(pixels.device, torch.float32), whole)
            pixels = F.interpolate(pixels, (height, width), mode="area") if whole != (height, width) else pixels
            pixels = pixels / noise.view(-1, 1, 1, 1)
        temb, modulations = None, [None] * (len(self.noise_refiner) + len(self.layers))
        if step is None:
            temb = self.embed_time(t.to(pixels.device))
        else:
            steps = 0 if cond.modulations is None else cond.modulations[0].shape[0]
            if not 0 <= step < steps:
                raise UserError(f"step must be one of the {steps} timesteps given to prepare, got {step}")
            modulations = [m[step : step + 1] for m in cond.modulations]

        grid = height // self.patch_size, width // self.patch_size
        x = self.embed_image(pixels)
        refiners = len(self.noise_refiner)
        for block, modulation in zip(self.noise_refiner, modulations[:refiners], strict=True):
            x = self._run(block, x, cond.rope_image, ALL_KEYS, temb, modulation)
        x = torch.cat([x, cond.text.to(x.dtype)], dim=1)
        for block, modulation in zip(self.layers, modulations[refiners:], strict=True):
            x = self._run(block, x, cond.rope_joint, cond.keys, temb, modulation)
        x = x[:, : math.prod(grid)].unflatten(1, grid).permute(0, 3, 1, 2)  # channels-last as it stands
        if whole != (height, width):
            x = F.interpolate(x, tuple(side // self.patch_size for side in whole), mode="bilinear")
        return x

    def prepare(
        self, cap_feats: Sequence[Tensor], height: int, width: int, timesteps: Tensor | None = None
    ) -> Conditioning:
        """Compute once what the steps of a run share: refined text, RoPE, mask and, with ``timesteps``, adaLN.

        Args:
            cap_feats: B tensors (L_i, cap_feat_dim) of text features without padding.
            height, width: size of the images in pixels.
            timesteps: (steps,) model times 1 - sigma of the run; `forward` then takes ``step`` instead of ``t``.

        Raises:
            UserError: a size that is no multiple of `size_multiple`, no texts, an empty text, a wrong feature width.
        """
        with _onloaded(self):
            return self._prepare(cap_feats, height, width, timesteps)

    def _prepare(
        self, cap_feats: Sequence[Tensor], height: int, width: int, timesteps: Tensor | None = None
    ) -> Conditioning:
        self.check_size(height, width)
        self.check_texts(cap_feats)
        device = self.x_pad_token.device
        lengths = [len(c) for c in cap_feats]
        padded = [_round_up(n) for n in lengths]
        longest = max(padded)

        tokens = self.cap_embedder(torch.cat([c.to(device, self.x_pad_token.dtype) for c in cap_feats]))
        pad = self.cap_pad_token.to(tokens)
        rows = [torch.cat([x, pad.expand(longest - len(x), -1)]) for x in tokens.split(lengths)]
        text = torch.stack(rows)
        text_positions = torch.zeros(longest, 3, dtype=torch.float64)
        text_positions[:, 0] = torch.arange(1, longest + 1)
        read = self._read_size(height, width)
        grid = read[0] // self.patch_size, read[1] // self.patch_size
        image_positions = [self._image_positions(grid, n) for n in (padded if len(set(padded)) > 1 else padded[:1])]
        image_positions = torch.stack(image_positions)  # one for all where the texts have one padded length
        joint_positions = torch.cat([image_positions, text_positions.expand(len(image_positions), -1, -1)], dim=1)
        rope_text, rope_image, rope_joint = (
            self._rope(p, device) for p in (text_positions[None], image_positions, joint_positions)
        )

        ragged = len(set(padded)) > 1
        text_keys = Keys(Ragged.of(padded, device) if ragged else None)
        for block in self.context_refiner:
            text = self._run(block, text, rope_text, text_keys)
        modulations = None
        if timesteps is not None:
            if timesteps.ndim != 1:
                raise UserError(f"timesteps must be (steps,), got {tuple(timesteps.shape)}")
            times = timesteps.to(device)
            if self.config.read_mean is not None:
                times = self._as_read(times.float(), (height, width))[1]
            temb, modulations = self.embed_time(times), []
            for block in self.modulated_blocks:
                with _onloaded(block):
                    modulations.append(block.adaLN_modulation(temb))
        image_length = image_positions.shape[1]
        keys = Keys(
            rows=Ragged.of((image_length + n for n in padded), device) if ragged else None,
            bias=self._key_bias(image_length, longest, grid, device),
        )
        return Conditioning(
            text=text,
            rope_image=rope_image,
            rope_joint=rope_joint,
            keys=keys,
            size=(height, width),
            modulations=modulations,
            head=self.settle_head(len(text), height, width, timesteps),
        )

    def _run(self, block: TransformerBlock, *args) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _read_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels at which the transformer reads an image of this size."""
        patch, side = self.patch_size, self.config.rope_grid
        tokens = max(height, width) // patch
        if self.config.read_mean is None or tokens <= side:
            return height, width
        return tuple(max(1, round(n // patch * side / tokens)) * patch for n in (height, width))

    def _as_read(self, t: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What an image of ``size`` is divided by, and its time, as the transformer reads it.

        Means over g x g pixels keep the image and divide the noise by g: (1 - s) x0 + (s / g) eps is k times a state of
        the smaller image's own flow at s / (g k), with k = 1 - s + s / g.
        """
        g = self.config.read_mean * math.sqrt(math.prod(size) / math.prod(self._read_size(*size)))
        sigma = 1 - t
        k = t + sigma / g
        return k, 1 - sigma / (g * k)

    def embed_time(self, t: Tensor) -> Tensor:
        """Model times 1 - sigma (B,) -> the embedding (B, A) that modulates the blocks."""
        return self.t_embedder(t.float() * self.config.t_scale, self.x_pad_token.dtype)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D), filled up to a multiple of 32."""
        patches = patchify(pixels, self.patch_size, dtype=self.x_pad_token.dtype)
        x = self.all_x_embedder[f"{self.patch_size}-1"](patches)
        missing = _round_up(x.shape[1]) - x.shape[1]
        if missing:
            x = torch.cat([x, self.x_pad_token.to(x.dtype).expand(x.shape[0], missing, -1)], dim=1)
        return x

    def _image_positions(self, grid: tuple[int, int], text_length: int) -> Tensor:
        """(N, 3) fp64 positions of the image tokens, behind a text of ``text_length`` padded tokens."""
        h, w = grid
        rows, columns = torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64)
        side = self.config.rope_grid
        if side is not None:
            step = side / max(h, w)
            rows = (rows + 0.5) * step - 0.5 + (side - h * step) / 2
            columns = (columns + 0.5) * step - 0.5 + (side - w * step) / 2
        positions = torch.zeros(_round_up(h * w), 3, dtype=torch.float64)  # padding tokens stay at 0, 0, 0
        positions[: h * w, 0] = text_length + 1
        positions[: h * w, 1] = rows.repeat_interleave(w)
        positions[: h * w, 2] = columns.repeat(h)
        return positions

    def _rope(self, positions: Tensor, device: torch.device) -> Rope:
        cos, sin = rope_tables(positions, self.config.axes_dims, self.config.rope_theta)
        return cos.to(device), sin.to(device)

    def _key_bias(self, image_length: int, text_length: int, grid: tuple[int, int], device) -> Tensor | None:
        """(1, 1, 1, N) for the joint blocks: where ``rope_grid`` is set, image keys weigh as much as on that grid."""
        if self.config.rope_grid is None or self.config.rope_grid**2 == math.prod(grid):
            return None
        bias = torch.zeros(1, 1, 1, image_length + text_length)
        bias[..., :image_length] = math.log(self.config.rope_grid**2 / math.prod(grid))
        return bias.to(device)

    @staticmethod
    def encode(encoders: Encoders, prompts: Sequence[str], device: torch.device, max_tokens: int) -> list[Tensor]:
        """Text features of prompts (L_i, C); see `encode_prompts`."""
        ((encoder, tokenizer),) = encoders
        return encode_prompts(encoder, tokenizer, prompts, device, max_tokens)


@contextlib.contextmanager
def _onloaded(module: nn.Module) -> Iterator[None]:
    """Bring a module's weights where they compute, around what is not its ``forward``, which alone hooks see.

    Between its turns offloading (accelerate's, or diffusers' in groups) leaves weights on another device, or empty.
    """
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [getattr(module, "_hf_hook", None), registry and registry.get_hook("group_offloading")]
    hooks = [hook for hook in hooks if hook is not None]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def _round_up(length: int) -> int:
    return -(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
