"""Near-duplicates: prompts that share most of their words (MinHash), or whose embeddings are nearly the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import UserError
from .llm import INSTALL, short
from .texts import terms

if TYPE_CHECKING:
    import torch

SHINGLE = 3  # terms that are compared together
PERMUTATIONS = 128
_AT_ONCE = 32  # prompts that are embedded together


class MinHashes:
    """Prompts by their shingles of `SHINGLE` terms; two are near when ``share`` of their shingles are the same.

    Raises:
        UserError: the package datasketch is missing.
    """

    def __init__(self, share: float):
        try:
            import datasketch
        except ImportError as error:
            raise UserError(f"near-duplicates need the package datasketch: {INSTALL}") from error
        self._lib, self.share = datasketch, share
        self._index = datasketch.MinHashLSH(threshold=share, num_perm=PERMUTATIONS)
        self._known: dict[str, datasketch.MinHash] = {}

    def near(self, text: str) -> tuple[str, float] | None:
        """(name, share) of the nearest of those added, if one is near."""
        mine = self._hash(text)
        found = [(self._known[name].jaccard(mine), name) for name in self._index.query(mine)]
        best = max(found, default=(0.0, ""))
        return (best[1], best[0]) if best[0] >= self.share else None

    def add(self, name: str, text: str) -> None:
        self._known[name] = self._hash(text)
        self._index.insert(name, self._known[name])

    def _hash(self, text: str) -> object:
        words = terms(text)
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        found = self._lib.MinHash(num_perm=PERMUTATIONS, seed=1)
        found.update_batch([shingle.encode() for shingle in shingles])
        return found


class Embeddings:
    """Prompts by the mean of a transformer's last states; two are near when their cosine is at least ``cosine``.

    Raises:
        UserError: no such folder, or no model in it.
    """

    def __init__(self, folder: str, cosine: float):
        import os

        from transformers import AutoModel, AutoTokenizer

        if not os.path.isdir(folder):
            raise UserError(f"--embeddings {folder} is not a folder; give one with a transformers model")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"can't load an embedding model from {folder}: {short(error)}") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.cosine = cosine

    @cached_property
    def _device(self) -> torch.device:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(device)
        return device

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, C) fp32 of length 1."""
        import torch
        from tqdm import tqdm

        parts = []
        for start in tqdm(range(0, len(texts), _AT_ONCE), desc="embeddings", disable=not sys.stderr.isatty()):
            batch = self._tokenizer(
                list(texts[start : start + _AT_ONCE]), padding=True, truncation=True, max_length=512,
                return_tensors="pt",
            ).to(self._device)  # fmt: skip
            with torch.inference_mode():
                states = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((states * mask).sum(1) / mask.sum(1).clamp(min=1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def doubles(self, texts: Sequence[str]) -> dict[int, tuple[int, float]]:
        """For each text that is near an earlier one that is kept: which one, and the cosine."""
        found: dict[int, tuple[int, float]] = {}
        if not texts:
            return found
        vectors, kept = self.embed(texts), []
        for index, vector in enumerate(vectors):
            if kept:
                likeness, place = (vectors[kept] @ vector).max(0)
                if likeness >= self.cosine:
                    found[index] = (kept[int(place)], float(likeness))
                    continue
            kept.append(index)
        return found
