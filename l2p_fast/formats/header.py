"""One safetensors file: an 8-byte length, a JSON header, the bytes. The only parser of such a header; loads no torch.

The container is read here directly: memory-mapped pages would count as ours, and the library's errors name no remedy.
Every number of a stranger's header is checked against the file's size before anything is allocated for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class Packing(NamedTuple):
    """How a type of GGUF's packs a row: blocks of ``values`` in ``size`` bytes; ``scales`` are those that are fp16."""

    values: int
    size: int
    scales: slice


PACKED = {
    "Q8_0": Packing(32, 34, slice(0, 2)), "Q6_K": Packing(256, 210, slice(208, 210)),
    "Q5_K": Packing(256, 176, slice(0, 4)), "Q4_K": Packing(256, 144, slice(0, 4)),
    "Q3_K": Packing(256, 110, slice(108, 110)), "Q2_K": Packing(256, 84, slice(80, 84)),
    "Q5_1": Packing(32, 24, slice(0, 4)), "Q5_0": Packing(32, 22, slice(0, 2)),
    "Q4_1": Packing(32, 20, slice(0, 4)), "Q4_0": Packing(32, 18, slice(0, 2)),
}  # fmt: skip
QUANTIZED = ("I8", "F8_E4M3", "F8_E5M2", *PACKED)


def bytes_of(dtype: str, count: int) -> int:
    """Bytes of ``count`` values of ``dtype``; of a packed type whole blocks."""
    if packing := PACKED.get(dtype):
        return count // packing.values * packing.size
    return count * ITEM_BYTES[dtype]


JSON_LIMIT = 16 << 20  # bytes of a header or a JSON file; a model of 10,000 tensors needs 1 MB
NAME_LIMIT = 255  # characters of a tensor's name
DIMS_LIMIT = 8
AGAIN = "download or copy it again"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies: ``shape`` elements of ``dtype`` from byte ``offset`` of ``file``.

    ``dtype`` is a safetensors name, or one of `PACKED`, whose rows are whole blocks.

    ``scale`` (scalar or one per row) and ``rotation`` (group size, 0 = none) belong to a quantized weight:
    value = stored x scale, then each group of ``rotation`` columns is rotated back by a Hadamard matrix.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: Stored | None = None
    rotation: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.numel)

    @property
    def quantized(self) -> bool:
        return self.dtype in QUANTIZED

    def rows(self, first: int, count: int) -> Stored:
        """The tensor made of ``count`` rows (first dimension) from row ``first``; a scale per row is cut along."""
        skip = first * bytes_of(self.dtype, math.prod(self.shape[1:]))
        scale = self.scale
        if scale is not None and scale.numel > 1:
            scale = scale.rows(first, count)
        return dataclasses.replace(self, shape=(count, *self.shape[1:]), offset=self.offset + skip, scale=scale)


# --- JSON that a stranger wrote --------------------------------------------------------------------------------------
def parse_json(text: bytes | str) -> Any:
    """``text`` as JSON.

    Raises:
        ValueError: not UTF-8, not JSON (NaN and Infinity are none), a key twice in one object, or nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name[:80]!r} is given twice")
            found[name] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file of at most ``limit`` bytes.

    Raises:
        UserError: unreadable, too large, or no JSON object.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file; download it again")
        with open(path, "rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    if len(text) > limit:
        raise UserError(f"{path} is over {limit >> 20} MB, too large for what it should hold; download it again")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return found


# --- The header ------------------------------------------------------------------------------------------------------
def _looks_like(head: bytes) -> str | None:
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle, which may run any code when it is loaded; use a .safetensors version of it"
    if head[:4] == b"GGUF":
        return "a GGUF file, which can only hold a whole model; use a .safetensors version"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with `git lfs pull` or `hf download`"
    if head.lstrip()[:1] == b"<":
        return "a web page, not the file itself; download it again (the address may need a login)"
    return None


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
            if size == 0:
                raise UserError(f"{path} is empty; {AGAIN}")
            # A header's length may begin like another format's magic, so its "{" decides first.
            other = None if start[8:9] == b"{" else _looks_like(start)
            if other:
                raise UserError(f"{path} is {other}")
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or start[8:9] not in (b"{", b"") or length < 2:
                raise UserError(
                    f"{path} is not a safetensors file (it starts with {start[:8]!r}); give a .safetensors file"
                )
            if length > size - 8:
                raise UserError(f"{path} is truncated: it ends inside its header ({size:,} bytes); {AGAIN}")
            if length > JSON_LIMIT:
                raise UserError(
                    f"{path} has a header of {length >> 20} MB, more than any model's (at most {JSON_LIMIT >> 20} MB); "
                    "get another version of the file"
                )
            file.seek(8)
            return file.read(length), size
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, last byte) of one entry.

    Raises:
        ValueError: it isn't one.
    """
    shown = name[:80]
    if len(name) > NAME_LIMIT or not name.isprintable():
        raise ValueError(f"{shown!r} is not a tensor's name")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{shown} lacks its dtype, shape or data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{shown} has a shape or data_offsets that are not lists of numbers from 0 up")
    if len(shape) > DIMS_LIMIT or len(offsets) != 2 or not isinstance(entry["dtype"], str):
        raise ValueError(f"{shown} has {len(shape)} dimensions, {len(offsets)} offsets, dtype {entry['dtype']!r:.20}")
    return entry["dtype"], tuple(shape), *offsets


def read_header(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of one safetensors file, from its header alone.

    Raises:
        UserError: ``path`` is unreadable, no safetensors file (a pickle, for one), truncated or damaged.
    """
    path = Path(path)
    text, size = _read_text(path)
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ does not map names to text")
        spans = {name: _entry(name, entry) for name, entry in header.items()}
    except ValueError as error:
        raise UserError(f"{path} has a damaged header ({error}); {AGAIN}") from error
    if not spans:
        raise UserError(f"{path} holds no tensors; give the file with the weights")
    tensors, start = {}, 8 + len(text)
    end = start
    for name, (dtype, shape, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if dtype not in ITEM_BYTES:
            raise UserError(
                f"{path}: {name} is stored as {dtype[:20]}, which is not supported; use a BF16, float8 or INT8 version"
            )
        stored = Stored(path, name, dtype, shape, start + first)
        if stored.offset != end or last - first != stored.nbytes:
            raise UserError(f"{path} has a damaged header: {name} {list(shape)} can't lie at {first}..{last}; {AGAIN}")
        tensors[name] = stored
        end = start + last
    if size != end:
        what = "truncated" if size < end else "longer than its header says"
        raise UserError(f"{path} is {what}: {size:,} of {end:,} bytes; {AGAIN}")
    return tensors, metadata
