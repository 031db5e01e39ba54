"""The tensors of a checkpoint: one safetensors file a process, which any number of processes can read.

    rank-00000.safetensors   of each tensor the rows that process 0 held; metadata "rows": {name: [first row, all rows]}

FSDP shares out rows, so a shard is a run of them. PyTorch's distributed checkpoint does the same, but its index is a
pickle, and its writer of safetensors needs a second copy of all that it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import regular
from ..formats.header import Stored, read_header
from ..formats.values import DTYPES, read_chunks
from ..formats.write import DTYPE_NAMES
from .parallel import held_rows, local

FILE = re.compile(r"rank-\d{5}\.safetensors")
CHUNK = 1 << 24  # bytes moved at a time
ROWS = "rows"  # of the metadata


class Damaged(UserError):
    """A checkpoint that can't be used: the message says which and why."""


def write(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """Write the rows that this process holds of ``tensors``, down to the disk; returns the file's SHA-256.

    Where it holds none (another copy of its shard is written) there is no file: None.

    Raises:
        OSError: it can't be written.
    """
    parts = {name: (local(t), *held_rows(t), t.shape[0]) for name, t in tensors.items()}
    parts = {name: part for name, part in parts.items() if part[2]}
    parts = dict(sorted(parts.items(), key=lambda item: (-item[1][0].dtype.itemsize, item[0])))  # aligned
    if not parts:
        return None
    rows = {name: [first, total] for name, (_, first, _, total) in parts.items()}
    header, end = {"__metadata__": {ROWS: json.dumps(rows)}}, 0
    for name, (value, *_) in parts.items():
        size = value.numel() * value.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + size]
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        digest.update(len(text).to_bytes(8, "little") + text)
        for value, *_ in parts.values():
            flat = value.detach().reshape(-1)
            for piece in flat.split(max(1, CHUNK // flat.element_size())):
                data = memoryview(piece.cpu().view(torch.uint8).numpy())
                file.write(data)
                digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


@dataclass
class Shard:
    """``stored`` holds rows of a tensor from row ``first`` on."""

    first: int
    stored: Stored

    @property
    def end(self) -> int:
        return self.first + self.stored.shape[0]


class Shards:
    """The tensors that lie in ``files`` of a checkpoint, each row of each exactly once.

    Attributes:
        shapes, dtypes: of the whole tensors, by name.

    Raises:
        Damaged: a file that does not belong to a checkpoint, or rows that are missing or twice there.
    """

    def __init__(self, folder: Path, files: list[str]):
        self.folder = folder
        self.parts: dict[str, list[Shard]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        totals: dict[str, set[int]] = {}
        try:
            for file in files:
                stored, metadata = read_header(regular(folder / file))
                rows = json.loads(metadata[ROWS])
                for name, where in stored.items():
                    first, total = (int(n) for n in rows[name])
                    self.parts.setdefault(name, []).append(Shard(first, where))
                    totals.setdefault(name, set()).add(total)
            for name, shards in self.parts.items():
                shards.sort(key=lambda shard: shard.first)
                edges = [0, *(shard.end for shard in shards)]
                [(dtype, tail)] = {(shard.stored.dtype, shard.stored.shape[1:]) for shard in shards}
                if edges[:-1] != [shard.first for shard in shards] or totals[name] != {edges[-1]}:
                    raise ValueError(f"the rows of {name} don't fit together")
                self.shapes[name], self.dtypes[name] = (edges[-1], *tail), DTYPES[dtype]
        except (UserError, ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
            raise Damaged(f"{folder} is damaged: {error}") from error

    def chunks(self, name: str, first: int = 0, count: int | None = None) -> Iterator[Tensor]:
        """``count`` rows of a tensor from row ``first`` on (all that follow), a few at a time, on the CPU.

        Raises:
            UserError: they can't be read, or are not finite.
        """
        end = self.shapes[name][0] if count is None else first + count
        for shard in self.parts[name]:
            start, stop = max(first, shard.first), min(end, shard.end)
            if start < stop:
                part = shard.stored.rows(start - shard.first, stop - start)
                yield from read_chunks(part, DTYPES[part.dtype])

    def fill(self, name: str, tensor: Tensor) -> None:
        """Give ``tensor``, which may be sharded, the values of ``name``.

        Raises:
            UserError: they can't be read, or are not finite.
        """
        held, (first, count) = local(tensor).detach(), held_rows(tensor, every_copy=True)
        place = 0
        for chunk in self.chunks(name, first, count):
            held[place : place + len(chunk)].copy_(chunk)
            place += len(chunk)
