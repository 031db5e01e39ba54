"""A tiny random L2P pipeline, built in a second, for the tests of sampling."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.sampling.pipeline import L2PPipeline, make_scheduler

FEATURES = 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def tiny_tokenizer(template: str | None = TEMPLATE) -> Qwen2Tokenizer:
    """Byte-level: every byte is a token, so any prompt can be spelt."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {c: i for i, c in enumerate(bytes_to_unicode().values())}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocab | {s: len(vocab) + i for i, s in enumerate(specials)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    tokenizer.chat_template = template
    return tokenizer


def tiny_text_encoder(seed: int = 0) -> Qwen3Model:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=FEATURES,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
    )
    return Qwen3Model(config).eval()


def tiny_transformer(patch: int = 16, seed: int = 0, **config) -> L2PTransformer2DModel:
    torch.manual_seed(seed)
    sizes = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "axes_dims": (4, 6, 6)} | config
    model = L2PTransformer2DModel(
        all_patch_size=(patch,), n_layers=2, n_refiner_layers=1, cap_feat_dim=FEATURES, head_width=0.05, **sizes
    )
    return model.eval()


def wide_transformer() -> L2PTransformer2DModel:
    """One whose blocks have sizes that 4 bits take, too."""
    return tiny_transformer(dim=192, n_heads=6, n_kv_heads=6, axes_dims=(8, 12, 12))


def tiny_pipeline(patch: int = 16, dtype: torch.dtype = torch.float32, transformer=None, **config) -> L2PPipeline:
    """A pipeline of random weights; ``config`` goes to `L2PPipeline`."""
    pipe = L2PPipeline(
        transformer or tiny_transformer(patch), tiny_text_encoder(), tiny_tokenizer(), make_scheduler(), **config
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def save_tiny(folder: Path, patch: int = 16, dtype: torch.dtype = torch.float32, **config) -> Path:
    tiny_pipeline(patch, dtype, **config).save_pretrained(folder)
    return folder
