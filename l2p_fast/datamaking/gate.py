"""A gate for images: how well each goes with its prompt, by a CLIP model of transformers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import UserError
from .llm import short

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipGate:
    """The cosine of an image's and its prompt's embeddings, in [-1, 1]. CLIP reads the first 77 tokens.

    Raises:
        UserError: no such folder, or no CLIP model in it.
    """

    def __init__(self, folder: str, device: str = "auto"):
        import torch
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        if not os.path.isdir(folder):
            raise UserError(f"--gate {folder} is not a folder; give one with a CLIP model of transformers")
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self._images = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"can't load a CLIP model from {folder}: {short(error)}") from error
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(device)

    def score(self, image: Image, prompt: str) -> float:
        import torch

        words = self._tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        pixels = self._images(images=[image], return_tensors="pt")["pixel_values"]
        device = self._model.device
        with torch.inference_mode():
            out = self._model(
                input_ids=words["input_ids"].to(device),
                attention_mask=words["attention_mask"].to(device),
                pixel_values=pixels.to(device),
            )
        return float(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)[0])
