"""Tiny random CLIPs in folders, and what each scores without our reader, for the tests of evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

Score = Callable[[Image.Image, str], float]
WIDTH = 16


def tokenizer(folder: Path, length: int):
    """Words of one byte each, with a start and an end."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    made = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=length)
    made.save_pretrained(folder)
    return made


def _parts(tokens: int, **vision) -> dict:
    both = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = both | {"vocab_size": 600, "max_position_embeddings": tokens, "bos_token_id": 512, "eos_token_id": 513}
    return {"text_config": text | {"pad_token_id": 513}, "vision_config": both | {"patch_size": 8} | vision}


def _cosine(one, other) -> float:
    one, other = (getattr(x, "pooler_output", x) for x in (one, other))
    return 100 * nn.functional.cosine_similarity(one, other).item()


def _save(folder: Path, parts: dict, state: dict) -> None:
    (folder / "config.json").write_text(
        json.dumps(parts | {"model_type": "stranger", "auto_map": {"AutoModel": "x.y"}})
    )
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")


def _clip_processor(folder: Path):
    from transformers import CLIPImageProcessor

    made = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made.save_pretrained(folder)
    return made


def save_clip(folder: Path, tokens: int = 24, fine: bool = False) -> Score:
    """A CLIP of 24 tokens; ``fine``: laid out as FG-CLIP."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir()
    torch.manual_seed(4)
    parts = _parts(tokens, image_size=32)
    model = CLIPModel(CLIPConfig(**parts, projection_dim=8)).eval()
    words, processor, state = tokenizer(folder, tokens), _clip_processor(folder), model.state_dict()
    if fine:
        table = state.pop("text_model.embeddings.position_embedding.weight")
        shared, rest = torch.randn_like(table), torch.randn_like(table)
        shared[:20], rest[20:] = table[:20], table[20:]
        name = "text_model.embeddings.position_embedding"
        state |= {f"{name}.weight": torch.randn(10, WIDTH), f"{name}_ori.weight": shared, f"{name}_res.weight": rest}
        state |= {"text_filip_projection.weight": torch.randn(8, WIDTH)}
        parts["text_config"]["max_position_embeddings"] = 10
    _save(folder, parts, state)

    @torch.no_grad()
    def score(image: Image.Image, text: str) -> float:
        ids = words([text], truncation=True, max_length=tokens, return_tensors="pt")["input_ids"]
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        return _cosine(model.get_image_features(pixels), model.get_text_features(ids))

    return score


def save_fg_clip(folder: Path) -> Score:
    return save_clip(folder, 30, fine=True)


def save_fg_clip2(folder: Path) -> Score:
    """A SigLIP 2 with the additions of FG-CLIP 2."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    folder.mkdir()
    torch.manual_seed(4)
    tokens, parts = 40, _parts(40, num_patches=16)
    parts["text_config"]["projection_size"] = WIDTH
    model = Siglip2Model(Siglip2Config(**parts)).eval()
    words = tokenizer(folder, tokens)
    processor = Siglip2ImageProcessor(patch_size=8)
    processor.save_pretrained(folder)
    state, name = model.state_dict(), "text_model.embeddings.position_embedding"
    table = state.pop(f"{name}.weight")
    shared, rest = torch.randn_like(table), torch.randn_like(table)
    shared[:20], rest[20:] = table[:20], table[20:]
    state |= {f"{name}.weight": torch.randn(10, WIDTH), f"{name}_ori.weight": shared, f"{name}_res.weight": rest}
    state |= {f"longtext_head.{part}": state[f"text_model.head.{part}"] for part in ("weight", "bias")}
    state |= {
        f"text_model.head.{part}": torch.randn_like(state[f"text_model.head.{part}"]) for part in ("weight", "bias")
    }
    parts["text_config"] |= {"max_position_embeddings": 10, "keep_len": 20, "longtext_len": 40, "model_type": "fgclip2"}
    _save(folder, parts, state)

    @torch.no_grad()
    def score(image: Image.Image, text: str) -> float:
        ids = words([text.lower()], padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        inputs = processor(images=image, return_tensors="pt", max_num_patches=576)
        return _cosine(model.get_image_features(**inputs), model.get_text_features(ids["input_ids"]))

    return score
