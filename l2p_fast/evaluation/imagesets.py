"""Sets of images with their texts, and what networks make of them, computed once and kept on disk."""

from __future__ import annotations

import csv
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_path, regular
from ..sampling.drawing import SUFFIXES, open_image, read_image, read_settings
from .suites import TILED, Work, read_json_lines, read_text

AT_ONCE = 128  # images whose features go into one file
_ORIENTATION = 0x0112  # an EXIF tag


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: its file.
        key: its name in the set; two sets are compared image by image where these agree.
        caption: what it shows, for CLIP; None: not known. ``long``: the same for a CLIP of long texts.
        prompt: what it was drawn from: images of one prompt are judged together.
        tile: (column, row) of a file that holds four; None: the whole file.
    """

    path: Path
    key: str
    caption: str | None = None
    long: str | None = None
    prompt: str | None = None
    tile: tuple[int, int] | None = None

    def load(self) -> Image.Image:
        """The image, RGB and upright.

        Raises:
            UserError: it can't be read.
        """
        image = read_image("image", str(self.path))
        if self.tile is None:
            return image
        width, height = image.width // 2, image.height // 2
        left, top = self.tile[0] * width, self.tile[1] * height
        return image.crop((left, top, left + width, top + height))

    def size(self) -> tuple[int, int]:
        """(height, width) of what `load` returns, from the file's header."""
        image = open_image("image", str(self.path))
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= 5:  # lying on its side
            width, height = height, width
        return (height, width) if self.tile is None else (height // 2, width // 2)

    def digest(self, more: str = "") -> str:
        """Of the file as it is now, of the tile and of ``more``, without reading it."""
        facts = os.stat(self.path)
        text = f"{self.path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}|{self.tile}|{more}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def bytes_of(image: Image.Image) -> Tensor:
    """(3, H, W) bytes."""
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def items_of_works(suite: str, works: Sequence[Work], out: Path) -> list[Item]:
    """The images of a benchmark's folder, tile by tile."""
    items = []
    for work in works:
        task, key = work.task, str(work.path.relative_to(out))
        tiles = [(0, 0), (1, 0), (0, 1), (1, 1)] if suite in TILED and len(work.requests) > 1 else [None]
        for tile in tiles:
            name = key if tile is None else f"{key} {tile}"
            items.append(Item(work.path, name, task.caption, task.long, task.key, tile))
    return items


def items_of_folder(folder: str, captions: str | None = None) -> list[Item]:
    """The images in a folder and below, by name.

    Args:
        captions: a CSV or JSON lines with ``image`` (or ``file_name``) and ``prompt`` (or ``text``, ``caption``);
            None: what our own images say of themselves.

    Raises:
        UserError: no such folder, no images, a table that can't be read.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{folder} is not a folder; name one with images")
    paths = sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
        and path.is_file()
    )
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    said = read_captions(captions) if captions is not None else None
    items = []
    for path in paths:
        key = path.relative_to(place).as_posix()
        if said is None:
            prompt = _own_prompt(path)
        else:
            prompt = said.get(key, said.get(path.name))
        items.append(Item(path, key, prompt, prompt, prompt))
    return items


def _own_prompt(path: Path) -> str | None:
    try:
        prompt = read_settings("image", str(path)).get("prompt")
    except UserError:  # not one of ours
        return None
    return prompt if isinstance(prompt, str) else None


def read_captions(path: str) -> dict[str, str]:
    """Captions by the names of images.

    Raises:
        UserError: no such table, or one without these columns.
    """
    if path.endswith((".jsonl", ".json")):
        rows = [row for _, row in read_json_lines(path)]
    else:
        try:
            rows = list(csv.DictReader(read_text(path).splitlines(keepends=True)))
        except csv.Error as error:
            raise UserError(f"{path} is not CSV ({error})") from error
    found = {}
    for row in rows:
        name = next((row[k] for k in ("image", "file_name") if isinstance(row.get(k), str)), None)
        text = next(
            (row[k] for k in ("prompt", "text", "caption", "long_caption") if isinstance(row.get(k), str)), None
        )
        if name is not None and text is not None:
            found[name] = text
    if not found:
        raise UserError(f"{path} has no rows with image (or file_name) and prompt (or text, caption)")
    return found


class Cache:
    """Features of images by a digest of the file, in safetensors files of a folder. An interrupted run goes on.

    Args:
        folder: None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def features(
        self, name: str, items: Sequence[Item], compute: Callable[[Item, int], Tensor], more: Sequence[str] = ()
    ) -> Tensor:
        """(N, ...) what ``compute(item, index)`` makes of every image, or made of it before.

        Args:
            name: of the network and its weights, as a file's name.
            more: what the features of each image depend on besides.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        keys = [item.digest(f"{name}|{text}") for item, text in zip(items, more or [""] * len(items), strict=True)]
        held: dict[str, Tensor] = {}
        wanted = set(keys)
        for path in sorted(self.folder.glob(f"{name}-*.safetensors")) if self.folder is not None else ():
            try:
                with safe_open(regular(path), "pt") as file:
                    held |= {key: file.get_tensor(key) for key in wanted.intersection(file.keys())}
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is damaged ({error}); remove it, and it is made again") from error
        fresh: dict[str, Tensor] = {}

        def keep() -> None:
            if fresh and self.folder is not None:
                part = hashlib.sha256("".join(fresh).encode()).hexdigest()[:12]
                with atomic_path(self.folder / f"{name}-{part}.safetensors") as temporary:
                    save_file(fresh, temporary)
            fresh.clear()

        waiting = [index for index, key in enumerate(keys) if key not in held]
        try:
            for index in tqdm(waiting, desc=name.split("-")[0], unit="image", disable=not sys.stderr.isatty()):
                held[keys[index]] = fresh[keys[index]] = compute(items[index], index).contiguous().cpu()
                if len(fresh) >= AT_ONCE:
                    keep()
        finally:
            keep()
        return torch.stack([held[key] for key in keys])
