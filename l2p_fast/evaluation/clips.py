"""CLIP models from a folder: how well an image fits a text, as 100 times the cosine of their features.

Read with transformers' own classes from safetensors; no code of the folder runs and nothing is downloaded. Known by
their tensors:

- CLIP, and Long-CLIP in the same layout: as many text tokens as the weights have positions (77, 248).
- FG-CLIP and FG-CLIP 2, for long texts: their table of positions is put together from two (the first 20 rows of one,
  the rest of the other). FG-CLIP 2 is a SigLIP 2 with a text head of its own for long texts; its texts are in lower
  case, as published.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UserError, few
from ..formats.header import load_json

KEPT = 20  # positions of FG-CLIP that both tables share, as published
_POSITIONS = "text_model.embeddings.position_embedding"
_PATCHES = (128, 256, 576, 784, 1024)  # of FG-CLIP 2: an image is given the fewest that hold it


class ClipModel:
    """A CLIP, a Long-CLIP or an FG-CLIP.

    Args:
        model: transformers' `CLIPModel` or `Siglip2Model`.
        tokenizer: its tokenizer.
        processor: its image processor.
        tokens: of a text that are read.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, processor: Any, tokens: int):
        self.model, self.tokenizer, self.processor, self.tokens = model, tokenizer, processor, tokens
        self.patches = model.config.model_type == "siglip2"

    @torch.inference_mode()
    def image(self, image: Image.Image) -> Tensor:
        """(C,) features of length 1."""
        options: dict[str, Any] = {}
        if self.patches:
            held = (image.width // 16) * (image.height // 16)
            options["max_num_patches"] = _PATCHES[sum(held > n for n in _PATCHES[:-1])]
        inputs = self.processor(images=image, return_tensors="pt", **options).to(self.model.device)
        return _pooled(self.model.get_image_features(**inputs))[0]

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, C) features of length 1."""
        texts = [text.lower() for text in texts] if self.patches else list(texts)
        ids = self.tokenizer(texts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt")
        # No mask: CLIP looks at no token after a text's last, and SigLIP is trained with the padding.
        return _pooled(self.model.get_text_features(ids["input_ids"].to(self.model.device)))


def _pooled(features: Any) -> Tensor:
    features = features if isinstance(features, Tensor) else features.pooler_output  # transformers 5 returns an object
    return (features / features.norm(dim=-1, keepdim=True)).float().cpu()


def load_clip(folder: str, device: torch.device) -> ClipModel:
    """The model of a transformers folder: ``config.json``, ``*.safetensors``, tokenizer and image processor.

    Raises:
        UserError: a folder without these, or another kind of model.
    """
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise UserError(f"{folder} is no folder of a CLIP model (no config.json); download one, such as openai's")
    config, state = load_json(place / "config.json"), _read(place)
    try:
        model, tokens = _build(config, state)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder} holds no CLIP or FG-CLIP ({' '.join(str(error).split())[:160]})") from error
    import transformers
    from transformers.utils import logging

    kind = (
        transformers.Siglip2ImageProcessor if model.config.model_type == "siglip2" else transformers.CLIPImageProcessor
    )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that it does without torchvision
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        processor = kind.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(f"{folder} lacks a tokenizer or an image processor that can be read ({words})") from error
    finally:
        logging.set_verbosity(level)
    return ClipModel(model.to(device).eval().requires_grad_(False), tokenizer, processor, tokens)


def _read(place: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise UserError(f"{place} holds no .safetensors; CLIP models are read from these alone")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged ({error}); download it again") from error
    return state


def _build(config: dict[str, Any], state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """The model with its weights, and how many tokens of a text it reads."""
    from transformers import CLIPConfig, CLIPModel, Siglip2Config, Siglip2Model

    if f"{_POSITIONS}_res.weight" in state:
        joined = state[f"{_POSITIONS}_res.weight"].clone()
        joined[:KEPT] = state[f"{_POSITIONS}_ori.weight"][:KEPT]
        state[f"{_POSITIONS}.weight"] = joined
    for part in ("weight", "bias"):
        if f"longtext_head.{part}" in state:
            state[f"text_model.head.{part}"] = state[f"longtext_head.{part}"]
    tokens = len(state[f"{_POSITIONS}.weight"])
    patches = state["vision_model.embeddings.patch_embedding.weight"].ndim == 2  # SigLIP 2 takes any aspect
    kind, kind_config = (Siglip2Model, Siglip2Config) if patches else (CLIPModel, CLIPConfig)
    parts = {name: dict(config[name]) for name in ("text_config", "vision_config")}
    parts["text_config"]["max_position_embeddings"] = tokens
    for part in parts.values():  # of FG-CLIP 2: a name that transformers doesn't know
        part.pop("model_type", None)
    rest = {} if patches else {"projection_dim": len(state["text_projection.weight"])}
    settings = kind_config(**json.loads(json.dumps(parts)), **rest)
    model = kind(settings)
    wanted = model.state_dict()
    lost = [name for name in wanted if name not in state and not name.endswith("position_ids")]
    if lost:
        raise ValueError(f"its weights lack {few(lost)}")
    model.load_state_dict({name: state[name].float() for name in wanted if name in state}, strict=False)
    return model, tokens
