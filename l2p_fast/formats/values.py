"""The numbers of stored tensors: read in pieces, dequantized, rotated back, cast and checked on the way.

A tensor is never read whole in the file's dtype: rows come in pieces of `CHUNK` bytes, so reading needs the tensor in
the wanted dtype and little more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UserError
from .header import Stored

CHUNK = 8 << 20  # bytes read, cast or written at a time

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds no NaN and no infinity; True for whole numbers."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # aminmax knows no float8
        return bool(tensor.float().isfinite().all())
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor.detach()))


def read_chunks(stored: Stored, dtype: torch.dtype, into: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """The rows of ``stored`` as dequantized, checked CPU tensors of ``dtype``, `CHUNK` bytes of the file at a time.

    With ``into`` (the whole tensor, any device) they are written there instead and the parts of it yielded.

    Raises:
        UserError: unreadable, or NaN or infinite values.
    """
    rows = stored.shape[0] if stored.shape else 1
    whole = stored if stored.shape else dataclasses.replace(stored, shape=(1,))
    step = max(1, CHUNK * rows // max(1, whole.nbytes))
    target = None if into is None else into.view(whole.shape)
    plain = stored.scale is None and not stored.rotation and DTYPES[stored.dtype] == dtype
    try:
        with open(stored.file, "rb", buffering=0) as file:
            for first in range(0, rows, step):
                part = whole.rows(first, min(step, rows - first))
                out = None if target is None else target[first : first + part.shape[0]]
                if plain and (out is None or out.device.type == "cpu"):
                    source = out = _read(file, part, out)
                else:
                    source = _dequantized(file, part)
                    out = source.to(dtype) if out is None else out.copy_(source)
                _check_finite(stored, out, source)
                yield out
    except OSError as error:
        raise UserError(f"can't read {stored.file}: {error.strerror or error}") from error


def read_tensor(stored: Stored, dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
    """The whole of ``stored`` in ``dtype`` on ``device``.

    Raises:
        UserError: see `read_chunks`.
    """
    out = torch.empty(stored.shape, dtype=dtype, device=device)
    for _ in read_chunks(stored, dtype, into=out):
        pass
    return out


def hadamard(size: int) -> torch.Tensor:
    """The regular Hadamard matrix (size, size), symmetric and its own inverse; ``size`` a power of 4 (ConvRot)."""
    seed = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix


def _read(file: Any, stored: Stored, out: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of ``stored`` as a tensor of its shape and dtype; into ``out`` (contiguous, on the CPU) if given."""
    if out is None:
        out = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    if stored.numel:
        file.seek(stored.offset)
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        if file.readinto(view) != len(view):
            raise UserError(f"{stored.file} ends inside {stored.name}; download or copy it again")
    return out


def _dequantized(file: Any, stored: Stored) -> torch.Tensor:
    values = _read(file, stored)
    if stored.scale is not None:
        scale = _read(file, stored.scale).float()
        values = values.float() * (scale.view(-1, *[1] * (values.dim() - 1)) if scale.numel() > 1 else scale.view(()))
    if stored.rotation:
        groups = values.float().unflatten(-1, (-1, stored.rotation))
        values = (groups @ hadamard(stored.rotation)).flatten(-2)
    return values


def _check_finite(stored: Stored, out: torch.Tensor, source: torch.Tensor) -> None:
    if is_finite(out):
        return
    if out.dtype == torch.float16 and source.float().isfinite().all():
        raise UserError(f"{stored.file}: {stored.name} has values beyond float16's range; use bfloat16")
    raise UserError(
        f"{stored.file}: {stored.name} holds NaN or infinite values: the file is damaged or its training diverged; "
        "get it again, or take an earlier training step"
    )
