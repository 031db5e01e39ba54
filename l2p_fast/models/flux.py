"""FLUX.1 as a source: diffusers' FluxTransformer2DModel on pixels.

19 blocks of two streams, then 38 of one. A text is T5's features, filled up to one length and all attended, with a
pooled vector of CLIP. FLUX.1 [dev] is distilled for guidance and told its scale by an embedding: a pixel model is told
the one that its training images were drawn with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from ..formats.shapes import HEAD
from .pixel import DiffusersPixelModel, TextBatch, grid_ids, pack_text
from .text import Encoders, clip_features, each_once, t5_features


class L2PFluxTransformer2DModel(DiffusersPixelModel, FluxTransformer2DModel):
    """FLUX.1 on pixels. The defaults are those of FLUX.1 [schnell]'s sizes; [dev] has ``guidance_embeds`` too.

    Args:
        pixel_patch_size: side of a patch in pixels: 16, 64, 128 or 160. It chooses the head.
        num_layers, num_single_layers: blocks of two streams and of one.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim, pooled_projection_dim: widths of the text's tokens and of its pooled vector.
        guidance_embeds: whether the guidance scale is embedded beside the time.
        embedded_guidance: the scale that is.
        axes_dims_rope: head channels per axis (0, row, column).
        head_width, x0_floor: see `models.zimage.L2PTransformer2DModel`.
        text_tokens: of a prompt that are read; None: as the source's pipeline does.
    """

    source = "flux"
    pixel_parts = ("x_embedder.", HEAD)
    stacks = ("transformer_blocks", "single_transformer_blocks")
    held = 11.0  # a block of one stream: input, attention, feed-forward, and these two side by side
    ignore_for_config = [*DiffusersPixelModel.ignore_for_config, "patch_size"]

    @register_to_config
    def __init__(
        self,
        pixel_patch_size: int = 16,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        embedded_guidance: float = 3.5,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        head_width: float = 1.0,
        x0_floor: float | None = None,
        text_tokens: int | None = None,
    ):
        super().__init__(
            in_channels=3 * pixel_patch_size**2,
            out_channels=1,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=tuple(axes_dims_rope),
        )
        self.become_pixels()

    def run_body(self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, cond: TextBatch) -> Tensor:
        guidance = torch.full_like(sigma, self.config.embedded_guidance) if self.config.guidance_embeds else None
        mask = cond.joint_mask(patches.shape[1])
        return FluxTransformer2DModel.forward(
            self,
            hidden_states=patches,
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=grid_ids(grid, 3, patches.device),
            txt_ids=torch.zeros(cond.text.shape[1], 3, device=patches.device),
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
            return_dict=False,
        )[0]

    @staticmethod
    def encode(encoders: Encoders, prompts: Sequence[str], device: torch.device, max_tokens: int) -> list[Tensor]:
        """Text features of prompts (1 + max_tokens, C): CLIP's pooled vector, then T5's features."""
        (clip, clip_tokenizer), (t5, t5_tokenizer) = encoders

        def features(prompt: str) -> Tensor:
            pooled = clip_features(clip, clip_tokenizer, prompt, device)[1]
            return pack_text(t5_features(t5, t5_tokenizer, prompt, device, max_tokens), pooled)

        return each_once(features, prompts)
