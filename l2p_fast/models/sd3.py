"""Stable Diffusion 3.5 as a source: diffusers' SD3Transformer2DModel on pixels.

Blocks of two streams, of which the first of SD 3.5 Medium attend the image alone a second time. Places are learned
sinusoids added to the tokens, cut from the middle of a table. A text is the features of two CLIPs side by side, then
T5's, filled up to one length and all attended, with the CLIPs' pooled vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from ..errors import UserError
from ..formats.shapes import HEAD
from ..variants import NATIVE_TOKENS
from .pixel import DiffusersPixelModel, TextBatch, pack_text
from .text import Encoders, clip_features, each_once, t5_features


class GridLinear(nn.Linear):
    """A linear layer over the channels of (B, C, h, w), in the place of a convolution whose kernel is a patch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class JointAttnProcessor:
    """What diffusers' JointAttnProcessor2_0 computes, through its attention dispatcher, so backends can be chosen.

    Image tokens first, then text. ``attention_mask`` (B, 1, 1, N + L) says which keys are seen, where there is text.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text = hidden_states, encoder_hidden_states

        def heads(linear: nn.Module, norm: nn.Module | None, x: Tensor) -> Tensor:
            x = linear(x).unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        parts = [heads(attn.to_q, attn.norm_q, image), heads(attn.to_k, attn.norm_k, image)]
        parts.append(heads(attn.to_v, None, image))
        if text is not None:
            of_text = [heads(attn.add_q_proj, attn.norm_added_q, text), heads(attn.add_k_proj, attn.norm_added_k, text)]
            of_text.append(heads(attn.add_v_proj, None, text))
            parts = [torch.cat(pair, dim=1) for pair in zip(parts, of_text, strict=True)]
        out = dispatch_attention_fn(
            *parts,
            attn_mask=None if text is None else attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(parts[0].dtype)
        if text is None:
            return attn.to_out[0](out)
        seen, read = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return attn.to_out[0](seen), read if attn.context_pre_only else attn.to_add_out(read)


class L2PSD3Transformer2DModel(DiffusersPixelModel, SD3Transformer2DModel, CacheMixin):
    """Stable Diffusion 3.5 on pixels. The defaults are those of SD 3.5 Medium.

    Args:
        pixel_patch_size: side of a patch in pixels: 16, 64, 128 or 160. It chooses the head.
        num_layers: blocks.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim, pooled_projection_dim: widths of the text's tokens and of its pooled vector.
        pos_embed_max_size: tokens of a side of the table of places; no image may have more.
        dual_attention_layers: blocks that attend the image alone as well.
        qk_norm: "rms_norm", or None.
        head_width, x0_floor: see `models.zimage.L2PTransformer2DModel`.
        text_tokens: of a prompt that are read; None: as the source's pipeline does.
        patch_size: of the class below, whose forward cuts nothing here: always 1.
    """

    source = "sd3"
    pixel_parts = ("pos_embed.proj.", HEAD)
    stacks = ("transformer_blocks",)
    ignore_for_config = [*DiffusersPixelModel.ignore_for_config, "sample_size", "caption_projection_dim"]
    small_config = {"pooled_projection_dim": 8, "pos_embed_max_size": 8, "num_layers": 3, "dual_attention_layers": (0,)}
    _repeated_blocks = ["JointTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        pixel_patch_size: int = 16,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 2048,
        pos_embed_max_size: int = 384,
        dual_attention_layers: Sequence[int] = tuple(range(13)),
        qk_norm: str | None = "rms_norm",
        head_width: float = 1.0,
        x0_floor: float | None = None,
        text_tokens: int | None = None,
        patch_size: int = 1,
    ):
        width = num_attention_heads * attention_head_dim
        super().__init__(
            sample_size=NATIVE_TOKENS,
            patch_size=patch_size,
            in_channels=1,
            out_channels=width,  # so its own unpatchify hands on the grid of features
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=width,
            pooled_projection_dim=pooled_projection_dim,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=tuple(dual_attention_layers),
            qk_norm=qk_norm,
        )
        self.pos_embed.proj = GridLinear(3 * pixel_patch_size**2, width)
        self.set_attn_processor(JointAttnProcessor())
        self.become_pixels()

    @property
    def embedder(self) -> nn.Linear:
        return self.pos_embed.proj

    def enable_cache(self, config: Any) -> None:
        from .caches import register_block

        register_block(JointTransformerBlock, image=1, text=0)
        super().enable_cache(config)

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        most = self.config.pos_embed_max_size
        if max(height, width) > most * self.patch_size:
            raise UserError(
                f"this model has places for sides of up to {most * self.patch_size} px, got {height} x {width}"
            )

    def run_body(self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, cond: TextBatch) -> Tensor:
        mask = cond.joint_mask(patches.shape[1], text_first=False)
        out = SD3Transformer2DModel.forward(
            self,
            hidden_states=patches.unflatten(1, grid).permute(0, 3, 1, 2),
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled,
            timestep=1000 * sigma,
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
            return_dict=False,
        )[0]
        return out.flatten(2).transpose(1, 2)

    @staticmethod
    def encode(encoders: Encoders, prompts: Sequence[str], device: torch.device, max_tokens: int) -> list[Tensor]:
        """Text features of prompts (1 + 77 + max_tokens, C): the pooled vectors, the CLIPs' features, T5's."""
        *clips, (t5, t5_tokenizer) = encoders

        def features(prompt: str) -> Tensor:
            states, pooled = zip(*(clip_features(*clip, prompt, device) for clip in clips), strict=True)
            of_t5, of_clip = t5_features(t5, t5_tokenizer, prompt, device, max_tokens), torch.cat(states, dim=-1)
            filled = F.pad(of_clip, (0, of_t5.shape[1] - of_clip.shape[1]))
            return pack_text(torch.cat([filled.to(of_t5.dtype), of_t5]), torch.cat(pooled))

        return each_once(features, prompts)
