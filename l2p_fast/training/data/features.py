"""Text features of prompts, made once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from ...files import atomic_path, regular
from ...variants import SOURCES

FEATURES_AT_ONCE = 256  # prompts in one file of cached features


class Features:
    """Text features (L, C) by prompt, kept in safetensors files of a folder; a prompt's key is a digest of it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.refresh()

    @staticmethod
    def key(prompt: str) -> str:
        return hashlib.sha256(prompt.encode()).hexdigest()[:32]

    def refresh(self) -> None:
        """Look again at what the folder holds."""
        from safetensors import SafetensorError, safe_open

        self._file_of, self._open = {}, {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self._open[path] = safe_open(regular(path), "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is damaged ({error}); remove it, and it is made again") from error
            self._file_of.update(dict.fromkeys(self._open[path].keys(), path))

    def missing(self, prompts: Iterable[str | None]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if p is not None and self.key(p) not in self._file_of]

    def add(self, prompts: Sequence[str], features: Sequence[Tensor]) -> None:
        """Write the features of ``prompts`` as one more file."""
        from safetensors.torch import save_file

        tensors = {self.key(p): f.contiguous().cpu() for p, f in zip(prompts, features, strict=True)}
        name = hashlib.sha256("".join(tensors).encode()).hexdigest()[:16]
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file(tensors, temporary)

    def __getitem__(self, prompt: str) -> Tensor:
        key = self.key(prompt)
        return self._open[self._file_of[key]].get_tensor(key)


def make_features(
    features: Features,
    prompts: Sequence[str],
    folder: str,
    device: torch.device,
    source: str = "zimage",
    max_tokens: int | None = None,
) -> None:
    """Encode ``prompts`` with the text encoders in ``folder`` into ``features``; what an interrupted run wrote stays.

    ``source``: whose encoders they are, a row of `variants.SOURCES`. ``max_tokens``: of a prompt; None: the source's.
    """
    from tqdm import tqdm

    from ...loading import load_text_encoders, model_class

    if not folder:
        raise UserError(
            f"{len(prompts)} prompts have no cached text features in {features.folder}; give data.text_encoder=FOLDER "
            "(with text_encoder/ and tokenizer/, such as a Z-Image folder) to make them"
        )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoders, model = load_text_encoders(folder, source, dtype, device), model_class(source)
    most = max_tokens or SOURCES[source].text_tokens
    for start in tqdm(range(0, len(prompts), FEATURES_AT_ONCE), desc="text features", disable=None):
        part = prompts[start : start + FEATURES_AT_ONCE]
        features.add(part, model.encode(encoders, part, device, most))
