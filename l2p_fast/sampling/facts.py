"""Which model a name stands for, and what is known about it without loading it. No torch here."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import FieldError, UserError
from ..files import near_path
from ..formats.checkpoint import Checkpoint, hub_of, patch_size_of
from ..variants import NATIVE_TOKENS, OF_PATCH
from .request import Lora

WEIGHTS = Path(__file__).parents[1] / "weights"  # the bundled pipeline folders
BUNDLED = {"tiny-1k": 16, "tiny-4k": 64}  # name -> patch size
LARGE = 2048  # from this side in pixels on the bundled model for large images is the default

BYTES_A_PIXEL = 36  # noise, state and prediction, fp32: what every device needs at the least


@dataclass(frozen=True)
class ModelFacts:
    """A model that is there.

    Attributes:
        name: as the user would name it again.
        path: of its file or folder.
        is_pipeline: whether it is a pipeline folder, with a text encoder and defaults of its own.
        patch_size: in pixels; None: its header doesn't tell, and loading will complain if it must.
    """

    name: str
    path: Path
    is_pipeline: bool
    patch_size: int | None

    @property
    def size_multiple(self) -> int | None:
        """What sides must be multiples of, in pixels."""
        return OF_PATCH[self.patch_size].size_multiple if self.patch_size in OF_PATCH else self.patch_size

    @property
    def native_size(self) -> int:
        """The side in pixels of an image when nothing says another."""
        return NATIVE_TOKENS * (self.patch_size or 16)


def find_model(name: str | None, size: int | None = None) -> ModelFacts:
    """The model that ``name`` stands for.

    Args:
        name: a path, "tiny-1k" or "tiny-4k" for a bundled model, or None: the bundled one for ``size``.
        size: the longer side in pixels.

    Raises:
        FieldError: nothing there.
    """
    bundled = name if name in BUNDLED else None
    if name is None:
        bundled = "tiny-4k" if (size or 0) >= LARGE else "tiny-1k"
    if bundled is not None and not (bundled == name and Path(bundled).exists()):
        path = WEIGHTS / bundled
        if not (path / "model_index.json").is_file():
            raise FieldError(
                "model", f"{bundled} is bundled, but not installed ({path}); name a checkpoint with {{model}}"
            )
        return ModelFacts(bundled, path, True, patch_size_of(path) or BUNDLED[bundled])
    path = Path(name)
    try:
        there = path.exists()
    except (OSError, ValueError):  # too long, or not a path at all
        there = False
    if not there:
        hint = near_path(name) or "; give a checkpoint file or folder, or leave it out for the bundled model"
        raise FieldError("model", f"{name} does not exist{hint}")
    return ModelFacts(name, path, (path / "model_index.json").is_file(), patch_size_of(path))


def find_draft(name: str | None, text_encoder: str | None, model: ModelFacts) -> ModelFacts:
    """The model that draws the small image of a request to refine, for ``model`` to bring to its size.

    Args:
        name: as for `find_model`; None: the bundled one, where ``model`` is bundled.
        text_encoder: of both.

    Raises:
        FieldError: nothing there, or no name and no bundled model.
    """
    if name is None and model.name not in BUNDLED:
        raise FieldError("refine", "has no small image; add {image}, or {draft} with a model that draws one")
    try:
        draft = find_model(name or "tiny-1k")
        check_text_encoder(text_encoder, draft)
    except FieldError as error:
        raise FieldError("draft", error.problem) from None
    return draft


def check_memory(height: int, width: int, multiple: int) -> None:
    """That an image of this size could be drawn in the memory of this machine, whatever the model.

    Raises:
        FieldError: the noise, the state and a prediction alone would not fit.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if height * width * BYTES_A_PIXEL > memory:
        fits = int(math.sqrt(memory / BYTES_A_PIXEL)) // multiple * multiple
        raise FieldError(
            "height" if height >= width else "width",
            f"{max(height, width)} asks for an image of {height * width * BYTES_A_PIXEL / 1e9:.0f} GB, and this "
            f"machine has {memory / 1e9:.0f} GB; {fits} x {fits} would fit",
        )


def check_lora(lora: Lora) -> None:
    """That the file is there and holds a LoRA, by its header; whether it fits the model shows when it is loaded.

    Raises:
        FieldError: it doesn't.
    """
    path = Path(lora.file)
    try:
        there = path.exists()
    except (OSError, ValueError):  # too long, or not a path at all
        there = False
    if not there:
        raise FieldError("lora", f"{lora.file} does not exist{near_path(lora.file)}")
    try:
        found = Checkpoint(path)
    except UserError as error:
        raise FieldError("lora", f"can't be used: {error}") from error
    if not found.is_lora:
        raise FieldError("lora", f"{lora.file} is not a LoRA; a whole model goes to {{model}}")


def check_text_encoder(name: str | None, model: ModelFacts) -> None:
    """That the text encoder is in the pipeline folder, in a folder of its own, or has a hub id's form.

    Raises:
        FieldError: it is not.
    """
    if name is None:
        if not (model.is_pipeline and (model.path / "text_encoder").is_dir()):
            raise FieldError(
                "model",
                f"{model.name} holds no text encoder; add {{text_encoder}} FOLDER (with text_encoder/ and "
                f"tokenizer/ in it), or {hub_of(model.path)} to download its own from the hub",
            )
        return
    if os.path.isdir(name):
        for part in ("text_encoder", "tokenizer"):
            if not os.path.isdir(os.path.join(name, part)):
                raise FieldError("text_encoder", f"{name} has no folder {part}; give the folder that holds both")
    elif not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise FieldError("text_encoder", f"{name} is neither a folder nor a hub id{near_path(name)}")
