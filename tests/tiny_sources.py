"""Tiny random source models as their own folders have them, for the tests of other sources than Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_pipeline import tiny_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIZES = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
FLUX_AXES = (4, 6, 6)
# Of each source: the latent class, what is its own of the sizes, the pipeline.
LATENT: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "flux": (
        FluxTransformer2DModel,
        {"num_single_layers": 2, "pooled_projection_dim": 24, "axes_dims_rope": FLUX_AXES, "guidance_embeds": True},
        FluxPipeline,
    ),
    "flux2": (
        Flux2Transformer2DModel,
        {"num_single_layers": 2, "joint_attention_dim": 96, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        Flux2KleinPipeline,
    ),
    "qwen_image": (QwenImageTransformer2DModel, {"axes_dims_rope": FLUX_AXES}, QwenImagePipeline),
    "sd3": (
        SD3Transformer2DModel,
        {
            "caption_projection_dim": 32, "pooled_projection_dim": 40, "pos_embed_max_size": 12,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm", "sample_size": 16,
        },
        StableDiffusion3Pipeline,
    ),
}  # fmt: skip
SOURCES = tuple(LATENT)


def latent(source: str, seed: int = 0):
    """The latent model, every parameter drawn."""
    torch.manual_seed(seed)
    kind, own, _ = LATENT[source]
    model = kind(**SIZES | own).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip(width: int, projected: bool):
    config = CLIPTextConfig(
        vocab_size=300, hidden_size=width, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=width, max_position_embeddings=20, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def clip_tokenizer():
    letters = [chr(97 + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=20)


def t5():
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def t5_tokenizer():
    letters = [(chr(97 + i), -2.0) for i in range(26)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters], extra_ids=0)


def qwen3():
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def qwen_vl():
    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def parts(source: str) -> dict[str, Any]:
    """Text encoders and tokenizers by the names of their folders."""
    torch.manual_seed(1)
    if source == "flux2":
        return {"text_encoder": qwen3(), "tokenizer": tiny_tokenizer()}
    if source == "qwen_image":
        return {"text_encoder": qwen_vl(), "tokenizer": tiny_tokenizer()}
    if source == "flux":
        return {
            "text_encoder": clip(24, False), "tokenizer": clip_tokenizer(),
            "text_encoder_2": t5(), "tokenizer_2": t5_tokenizer(),
        }  # fmt: skip
    return {
        "text_encoder": clip(16, True), "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip(24, True), "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5(), "tokenizer_3": t5_tokenizer(),
    }  # fmt: skip


def pipeline(source: str) -> DiffusionPipeline:
    """Diffusers' own pipeline, without an autoencoder."""
    pipe = LATENT[source][2](
        transformer=latent(source), vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), **parts(source)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_source(folder: Path, source: str) -> Path:
    """A folder as it is published: transformer, text encoders and tokenizers."""
    latent(source).save_pretrained(folder / "transformer")
    for name, part in parts(source).items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text("{}")
    return folder
