"""The header of a GGUF file. Loads neither torch nor the gguf package, whose reader believes every count that it finds.

Little-endian versions 2 and 3, as ComfyUI-GGUF, stable-diffusion.cpp and llama.cpp write them: counts, pairs of keys
and values, then each tensor's name, dimensions (innermost first), type and offset. Every number is checked against the
file's size before anything is allocated for it. Types that can't be unpacked here are refused.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from .header import AGAIN, DIMS_LIMIT, ITEM_BYTES, JSON_LIMIT, NAME_LIMIT, PACKED, Stored, bytes_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
ENTRIES_LIMIT = 1 << 16  # tensors, and keys; a model of 6 billion parameters has some 500
TEXT_LIMIT = 1 << 16  # bytes of a text that is kept
# Of a value: its struct format, by type.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# ggml forgets outer dimensions of 1; these tensors have some.
_DIMENSIONS = {"x_pad_token": 2, "cap_pad_token": 2, "pos_embed": 3}


class _Reader:
    """The header's bytes, no more of them than a header may have.

    Methods raise ValueError where the file ends, or the header is larger than any model's.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    @property
    def place(self) -> int:
        return self.file.tell()

    def _check(self, count: int) -> None:
        if count > self.size - self.place:
            raise ValueError("it ends inside its header")
        if count > JSON_LIMIT - self.place:
            raise ValueError(f"its header has over {JSON_LIMIT >> 20} MB")

    def take(self, count: int) -> bytes:
        self._check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self._check(count)
        self.file.seek(count, 1)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def name(self) -> str:
        length = self.number("Q")
        if not 0 < length <= 4 * NAME_LIMIT:
            raise ValueError(f"a name has {length:,} bytes")
        found = self.take(length).decode()
        if len(found) > NAME_LIMIT or not found.isprintable():
            raise ValueError(f"{found[:80]!r} is not a name")
        return found

    def value(self, kind: int) -> Any:
        """A number or a text; None for a list, or a text that is too long to be of use: they are passed over."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            length = self.number("Q")
            if length <= TEXT_LIMIT:
                return self.take(length).decode()
            return self.skip(length)
        if kind != _ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            return self.skip(count * struct.calcsize(_NUMBERS[inner]))
        if inner != _TEXT:
            raise ValueError(f"a list has the type {inner}")
        self._check(8 * count)
        for _ in range(count):
            self.skip(self.number("Q"))
        return None


def read_gguf(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the texts among the metadata of one GGUF file, from its header alone.

    Raises:
        UserError: ``path`` is unreadable, no GGUF file, truncated or damaged, or holds a type that is not supported.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            entries, metadata, start, alignment = _read(_Reader(file, size), path)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} has a damaged header ({error}); {AGAIN}") from error
    if not entries:
        raise UserError(f"{path} holds no tensors; give the file with the weights")
    tensors, end = {}, start
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        dtype = TYPES.get(kind, "")
        if dtype not in ITEM_BYTES and dtype not in PACKED:
            known = ", ".join([*PACKED, "BF16, F16 and F32"])
            raise UserError(f"{path}: {name} is stored as GGUF's type {dtype or kind}; supported: {known}")
        if dtype in PACKED and (not shape or shape[-1] % PACKED[dtype].values):
            raise UserError(f"{path} has a damaged header: {name} {list(shape)} can't be of {dtype}; {AGAIN}")
        if offset != end - start:
            raise UserError(f"{path} has a damaged header: {name} {list(shape)} can't lie at {offset}; {AGAIN}")
        tensors[name] = Stored(path, name, dtype, shape, end)
        last = end + bytes_of(dtype, math.prod(shape))
        end = start + _up(last - start, alignment)
    if not last <= size <= end:
        what = "truncated" if size < last else "longer than its header says"
        raise UserError(f"{path} is {what}: {size:,} of {last:,} bytes; {AGAIN}")
    return tensors, metadata


_Entry = tuple[str, tuple[int, ...], int, int]  # name, shape, type, offset


def _read(reader: _Reader, path: Path) -> tuple[list[_Entry], dict[str, str], int, int]:
    """Entries, metadata, where the data start, and their alignment."""
    if reader.take(4) != MAGIC:
        raise UserError(f"{path} is not a GGUF file")
    version = reader.number("I")
    if version not in VERSIONS:
        words = "is big-endian" if version >> 24 else f"is of version {version}"
        raise UserError(f"{path} {words}; GGUF of versions 2 and 3, little-endian, is read: get another version of it")
    counts = reader.number("Q"), reader.number("Q")
    if max(counts) > ENTRIES_LIMIT:
        raise ValueError(f"it has {counts[0]:,} tensors and {counts[1]:,} keys")
    values: dict[str, Any] = {}
    for _ in range(counts[1]):
        key = reader.name()
        if key in values:
            raise ValueError(f"{key!r} is given twice")
        values[key] = reader.value(reader.number("I"))
    alignment = values.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r:.40}")
    entries: list[_Entry] = []
    names = set()
    for _ in range(counts[0]):
        name, rank = reader.name(), reader.number("I")
        if name in names:
            raise ValueError(f"{name!r} is given twice")
        names.add(name)
        if rank > DIMS_LIMIT:
            raise ValueError(f"{name} has {rank:,} dimensions")
        shape = tuple(reader.number("Q") for _ in range(rank))[::-1]
        kind, offset = reader.number("I"), reader.number("Q")
        if any(side >= 1 << 48 for side in (*shape, offset)) or math.prod(shape) >= 1 << 48:
            raise ValueError(f"{name} {list(shape)} can't lie at {offset}")
        outer = next((rank for leaf, rank in _DIMENSIONS.items() if name.rpartition(".")[2] == leaf), 0)
        entries.append((name, (1,) * (outer - len(shape)) + shape, kind, offset))
    start = _up(reader.place, alignment)
    return entries, {key: value for key, value in values.items() if isinstance(value, str)}, start, alignment


def _up(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment
