"""Qwen-Image as a source: diffusers' QwenImageTransformer2DModel on pixels.

60 blocks of two streams. A text is the last hidden state of Qwen2.5-VL after a fixed instruction; texts keep their own
lengths, and what makes a batch rectangular is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformer2DModel
from torch import Tensor, nn

from ..formats.shapes import HEAD
from .pixel import DiffusersPixelModel, TextBatch
from .text import Encoders, each_once, hidden_states

# As diffusers' pipeline has them: the instruction, and how many tokens of it are cut off.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
CUT = 34


class L2PQwenImageTransformer2DModel(DiffusersPixelModel, QwenImageTransformer2DModel):
    """Qwen-Image on pixels. The defaults are the published model's.

    Args:
        pixel_patch_size: side of a patch in pixels: 16, 64, 128 or 160. It chooses the head.
        num_layers: blocks.
        attention_head_dim, num_attention_heads: their product is the width.
        joint_attention_dim: width of the text's tokens.
        axes_dims_rope: head channels per axis (0, row, column).
        head_width, x0_floor: see `models.zimage.L2PTransformer2DModel`.
        text_tokens: of a prompt that are read; None: as the source's pipeline does.
    """

    source = "qwen_image"
    pixel_parts = ("img_in.", HEAD)
    stacks = ("transformer_blocks",)
    biased = True  # the mask of ragged texts
    ignore_for_config = [
        *DiffusersPixelModel.ignore_for_config, "patch_size", "guidance_embeds", "zero_cond_t",
        "use_additional_t_cond", "use_layer3d_rope",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        pixel_patch_size: int = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        head_width: float = 1.0,
        x0_floor: float | None = None,
        text_tokens: int | None = None,
    ):
        super().__init__(
            patch_size=1,
            in_channels=3 * pixel_patch_size**2,
            out_channels=1,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            axes_dims_rope=tuple(axes_dims_rope),
        )
        with torch.device("cpu"):  # its tables are in no file, and no buffers: a model made without memory lacks them
            self.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(axes_dims_rope), scale_rope=True)
        self.become_pixels()

    @property
    def idle(self) -> tuple[str, ...]:
        """The last block's text stream, which nothing reads."""
        last = f"transformer_blocks.{self.config.num_layers - 1}"
        return f"{last}.attn.to_add_out.", f"{last}.txt_mlp."

    @property
    def embedder(self) -> nn.Linear:
        return self.img_in

    def run_body(self, patches: Tensor, grid: tuple[int, int], sigma: Tensor, cond: TextBatch) -> Tensor:
        return QwenImageTransformer2DModel.forward(
            self,
            hidden_states=patches,
            encoder_hidden_states=cond.text,
            encoder_hidden_states_mask=cond.mask,
            timestep=sigma,
            img_shapes=[[(1, *grid)]] * len(patches),
            return_dict=False,
        )[0]

    @staticmethod
    def encode(encoders: Encoders, prompts: Sequence[str], device: torch.device, max_tokens: int) -> list[Tensor]:
        """Text features of prompts (L_i, C)."""
        ((encoder, tokenizer),) = encoders

        def features(prompt: str) -> Tensor:
            text = TEMPLATE.format(prompt)
            return hidden_states(encoder, tokenizer, text, device, CUT + max_tokens)[-1][CUT:]

        return each_once(features, prompts)
