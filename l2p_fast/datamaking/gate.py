"""A gate for images: how well each goes with its prompt, by a CLIP model of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipGate:
    """The cosine of an image's and its prompt's features, in [-1, 1], by any model that evaluation reads.

    Raises:
        UserError: no such folder, or no CLIP model in it.
    """

    def __init__(self, folder: str, device: str = "auto"):
        import torch

        from ..evaluation.clips import load_clip

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clip = load_clip(folder, torch.device(device))

    def score(self, image: Image, prompt: str) -> float:
        return float(self._clip.image(image) @ self._clip.texts([prompt])[0])
