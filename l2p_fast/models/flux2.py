"""FLUX.2 [klein] as a source: diffusers' Flux2Transformer2DModel on pixels.

Blocks of two streams, then of one; all of a kind share their modulation. A text is three hidden states of a Qwen3 side
by side, filled up to one length and all attended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor

from ..formats.shapes import HEAD
from .pixel import DiffusersPixelModel, TextBatch, grid_ids
from .text import Encoders, each_once, hidden_states, template_prompt


class L2PFlux2Transformer2DModel(DiffusersPixelModel, Flux2Transformer2DModel):
    """FLUX.2 on pixels. The defaults are those of FLUX.2 [klein] 4B.

    Args:
        pixel_patch_size: side of a patch in pixels: 16, 64, 128 or 160. It chooses the head.
        num_layers, num_single_layers: blocks of two streams and of one.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: width of the text's tokens.
        timestep_guidance_channels: width of the sinusoid of time.
        mlp_ratio: width of the feed-forward layers over the model's.
        axes_dims_rope, rope_theta: head channels per axis (0, row, column, place in the text), and RoPE's base.
        eps: of the norms.
        guidance_embeds, embedded_guidance: whether the guidance scale is embedded beside the time, and which.
        head_width, x0_floor: see `models.zimage.L2PTransformer2DModel`.
        text_tokens: of a prompt that are read; None: as the source's pipeline does.
    """

    source = "flux2"
    pixel_parts = ("x_embedder.", HEAD)
    stacks = ("transformer_blocks", "single_transformer_blocks")
    held = 20.0  # a block of one stream: all projections at once are nine, their parts as many again
    ignore_for_config = [*DiffusersPixelModel.ignore_for_config, "patch_size"]

    @register_to_config
    def __init__(
        self,
        pixel_patch_size: int = 16,
        num_layers: int = 5,
        num_single_layers: int = 20,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 7680,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: Sequence[int] = (32, 32, 32, 32),
        rope_theta: float = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = False,
        embedded_guidance: float = 4.0,
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
            timestep_guidance_channels=timestep_guidance_channels,
            mlp_ratio=mlp_ratio,
            axes_dims_rope=tuple(axes_dims_rope),
            rope_theta=rope_theta,
            eps=eps,
            guidance_embeds=guidance_embeds,
        )
        self.become_pixels()

    def run_body(self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, cond: TextBatch) -> Tensor:
        guidance = torch.full_like(sigma, self.config.embedded_guidance) if self.config.guidance_embeds else None
        mask, text_ids = cond.joint_mask(patches.shape[1]), torch.zeros(cond.text.shape[1], 4, device=patches.device)
        text_ids[:, 3] = torch.arange(len(text_ids), device=patches.device)
        return Flux2Transformer2DModel.forward(
            self,
            hidden_states=patches,
            encoder_hidden_states=cond.text,
            timestep=sigma,
            guidance=guidance,
            img_ids=grid_ids(grid, 4, patches.device),
            txt_ids=text_ids,
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
            return_dict=False,
        )[0]

    @staticmethod
    def encode(encoders: Encoders, prompts: Sequence[str], device: torch.device, max_tokens: int) -> list[Tensor]:
        """Text features of prompts (max_tokens, C): hidden states at a quarter, half and three quarters of depth."""
        ((encoder, tokenizer),) = encoders
        depth = encoder.config.num_hidden_layers

        def features(prompt: str) -> Tensor:
            text = template_prompt(tokenizer, prompt, thinking=False)
            states = hidden_states(encoder, tokenizer, text, device, max_tokens, fill=True)
            return torch.cat([states[depth // 4], states[depth // 2], states[3 * depth // 4]], dim=-1)

        return each_once(features, prompts)
