"""Images with prompts, in three layouts on disk.

    folder or .csv   metadata.csv with the columns image (or file_name), prompt (or text) and, if wanted, seed: the
                     published layouts; images that are no files are looked for in the .tar shards beside it
    imagefolder      metadata.jsonl with file_name and prompt, text or caption: Hugging Face's layout
    webdataset       .tar shards; of each sample an image and a .txt or a .json (prompt, text or caption; seed)

Shards are indexed once by their headers and then read at any place, so all layouts are lists of `TrainingImage`.
Left out: streaming shards from a network.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import reprlib
import struct
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import UserError
from ...files import regular
from ..config import DataConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PROMPT_KEYS = ("prompt", "text", "caption")
MAX_PIXELS = 2**30  # of an image; a header that promises more is taken for a damaged one
MAX_TEXT = 2**20  # bytes of a prompt's file in a shard
UNREADABLE = (  # what PIL raises for damaged files
    OSError, ValueError, SyntaxError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
DAMAGED = (OSError, ValueError, LookupError, ArithmeticError, RecursionError, csv.Error, tarfile.TarError)


@dataclass(frozen=True)
class TrainingImage:
    """A training image, not yet opened: a file, or ``length`` bytes from ``offset`` of a shard, of data `path`.

    Without a ``prompt`` it is what a shard lacks, and its ``member`` says why: it counts as unreadable.
    """

    file: str
    prompt: str | None
    seed: int | None = None
    member: str = ""
    offset: int = 0
    length: int = 0
    path: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}:{self.member}" if self.member else self.file

    def open(self) -> Image.Image:
        """The image with its header read; raises one of `UNREADABLE`."""
        Image.MAX_IMAGE_PIXELS = None  # global, so once and for all: it guards from strangers, and 10K is ordinary here
        if self.member:
            with open(regular(self.file), "rb") as file:
                file.seek(self.offset)
                image = Image.open(io.BytesIO(file.read(self.length)))
        else:
            image = Image.open(regular(self.file))
        if image.width * image.height > MAX_PIXELS:
            image.close()
            raise Image.DecompressionBombError(f"{self.name} has more than {MAX_PIXELS} pixels")
        return image

    def load(self, height: int, width: int) -> Tensor:
        """(3, height, width) fp32 in [-1, 1]: resized to cover, the middle cut out."""
        with self.open() as image:
            image.load()
            image.getexif()  # the image keeps it; of its bytes PIL would write a turned copy, and fail at any odd tag
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image).convert("RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def list_images(config: DataConfig) -> list[TrainingImage]:
    """All images of ``config.path`` and of the grids' own paths, in the order of their tables or shards.

    Raises:
        UserError: no such data, no known layout, a row without a prompt, a value that is not a number.
    """
    if any(not (grid.path or config.path) for grid in config.grids):
        raise UserError("no training data; give data.path=FOLDER (metadata.csv, metadata.jsonl or .tar shards)")
    paths = dict.fromkeys(grid.path or config.path for grid in config.grids)
    return [replace(image, path=path) for path in paths for image in _list(path, config.layout)]


def _list(where: str, layout: str) -> list[TrainingImage]:
    path = Path(where)
    shards = sorted(glob.glob(str(path / "*.tar") if path.is_dir() else where))
    if layout == "auto":
        if path.suffix == ".csv" or _table_in(path) is not None:
            layout = "csv"
        elif path.suffix == ".jsonl" or (path / "metadata.jsonl").exists():
            layout = "imagefolder"
        elif shards and shards[0].endswith(".tar"):
            layout = "webdataset"
        else:
            raise UserError(f"{path} holds no metadata.csv, no metadata.jsonl and no .tar shards; check data.path")
    if layout == "webdataset":
        found = [image for shard in shards for image in _read_shard(shard)]
    else:
        table = path
        if path.is_dir():
            table = (_table_in(path) or path / "metadata.csv") if layout == "csv" else path / "metadata.jsonl"
        try:
            with open(regular(table), newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file) if layout == "csv" else filter(str.strip, file))
        except DAMAGED as error:
            raise UserError(f"can't read {table}: {error}") from error
        found = [_of_row(row, table, number) for number, row in enumerate(rows, 1)]
        beside = sorted(map(str, table.parent.glob("*.tar"))) if layout == "csv" else []
        if beside:
            found = _in_shards(found, table.parent, beside)
    if not found:
        raise UserError(f"{path} names no images; check data.path and data.layout")
    return found


def _table_in(folder: Path) -> Path | None:
    """metadata.csv, or beside shards the only other .csv that has columns of images and prompts."""
    if (folder / "metadata.csv").exists():
        return folder / "metadata.csv"
    tables = [path for path in folder.glob("*.csv") if _has_columns(path)] if any(folder.glob("*.tar")) else []
    return tables[0] if len(tables) == 1 else None


def _has_columns(table: Path) -> bool:
    try:
        with open(regular(table), newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file), [])
    except DAMAGED:
        return False
    return not {"image", "file_name"}.isdisjoint(columns) and not set(PROMPT_KEYS).isdisjoint(columns)


def _in_shards(images: list[TrainingImage], folder: Path, shards: list[str]) -> list[TrainingImage]:
    """``images`` of a table; those that are no files are the members of ``shards`` whose paths end as theirs do.

    An image that neither is there stays as it is, and counts as unreadable.
    """
    members: dict[str, tuple[str, tarfile.TarInfo] | None] = {}  # by each end of a path; None: there are two of it
    for shard in shards:
        try:
            with open(regular(shard), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                with contextlib.suppress(tarfile.ReadError):  # what a shard that ends early has lost is unreadable
                    for member in tar:
                        if member.isfile() and member.name.lower().endswith(SUFFIXES):
                            for end in _ends(member.name):
                                members[end] = None if end in members else (shard, member)
        except DAMAGED as error:
            raise UserError(f"can't read the shard {shard}: {error}") from error
    found = []
    for image in images:
        if not Path(image.file).is_file():
            name = image.file.removeprefix(f"{folder}/")
            match = next((members[end] for end in _ends(name) if members.get(end)), None)
            if match is not None:
                shard, member = match
                image = replace(image, file=shard, member=member.name, offset=member.offset_data, length=member.size)
        found.append(image)
    return found


def _ends(path: str) -> list[str]:
    """``a/b/c``, ``b/c`` and ``c``."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _of_row(row: dict | str, table: Path, number: int) -> TrainingImage:
    """The image of a row of metadata.csv or a line of metadata.jsonl."""
    where = f"{table}, image {number}"
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except DAMAGED as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: wanted an object with file_name and prompt, got {reprlib.repr(row)}")
    file = row.get("image") or row.get("file_name")
    prompt = _prompt(row)
    if not file or not isinstance(file, str) or prompt is None:
        keys = ", ".join(str(key)[:40] for key in list(row)[:10])
        raise UserError(f"{where}: wanted image (or file_name) and prompt, got {keys}")
    return TrainingImage(str(table.parent / file), prompt, _seed(row.get("seed"), where))


def _prompt(about: dict) -> str | None:
    text = next((about[key] for key in PROMPT_KEYS if isinstance(about.get(key), str)), None)
    return None if text is None else text.encode(errors="replace").decode()  # JSON can hold half a character


def _seed(value: object, where: str) -> int | None:
    if value in (None, ""):
        return None
    try:
        seed = int(value)
        torch.Generator().manual_seed(seed)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: seed must be a whole number of 64 bits, got {reprlib.repr(value)}") from error
    return seed


def _read_shard(shard: str) -> list[TrainingImage]:
    """The samples of a WebDataset shard: members of one name up to the first dot belong together.

    What can't be trained on is among them, without a prompt; one more stands for all that a shard lost that ends early.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with open(regular(shard), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with contextlib.suppress(tarfile.ReadError):
                for member in tar:
                    suffix = "".join(member.name.rpartition("/")[2].partition(".")[1:])
                    if member.isfile():
                        samples.setdefault(member.name.removesuffix(suffix), {})[suffix.lower()] = member
            found = [_of_sample(shard, tar, name, parts) for name, parts in samples.items()]
            file.seek(tar.offset)  # where the next member would be: zeros end an archive
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                found.append(TrainingImage(shard, None, member="(the shard ends early)"))
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"can't read the shard {shard}: {error}") from error
    return found


def _of_sample(shard: str, tar: tarfile.TarFile, name: str, parts: dict[str, tarfile.TarInfo]) -> TrainingImage:
    """The image of the members ``parts`` (by suffix) of a shard; without a prompt if one of them lacks."""
    image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
    why = "no image" if image is None else "no prompt"
    try:
        about = json.loads(tar.extractfile(parts[".json"]).read(MAX_TEXT)) if ".json" in parts else {}
        if not isinstance(about, dict):
            raise ValueError("no object")
        if ".txt" in parts:
            about["prompt"] = tar.extractfile(parts[".txt"]).read(MAX_TEXT).decode().strip()
        prompt = _prompt(about)
    except DAMAGED:
        prompt, why = None, "its prompt is damaged"
    if image is None or prompt is None:
        return TrainingImage(shard, None, member=f"{name} ({why})")
    seed = _seed(about.get("seed"), f"{shard}:{image.name}")
    return TrainingImage(shard, prompt, seed, image.name, image.offset_data, image.size)
