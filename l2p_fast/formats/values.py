"""The numbers of stored tensors: read in pieces, dequantized, rotated back, cast and checked on the way.

A tensor is never read whole in the file's dtype: rows come in pieces of `CHUNK` bytes, so reading needs the tensor in
the wanted dtype and little more.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .decode import codes_shape, decode, decodes_finite
from .header import PACKED, Stored

CHUNK = 8 << 20  # bytes read, cast or written at a time

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
} | dict.fromkeys(PACKED, torch.uint8)  # fmt: skip


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
    whole = stored if stored.shape else dataclasses.replace(stored, shape=(1,))
    if stored.dtype in PACKED and len(stored.shape) == 1:
        whole = dataclasses.replace(stored, shape=(1, *stored.shape))
    rows = whole.shape[0]
    step = max(1, CHUNK * rows // max(1, whole.nbytes))
    target = None if into is None else into.view(whole.shape)
    plain = stored.scale is None and not stored.rotation and DTYPES[stored.dtype] == dtype
    plain &= stored.dtype not in PACKED
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


def read_codes(stored: Stored, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A quantized weight as it is stored, and its scale in fp32, both on the CPU; `decode.decode` takes them.

    Raises:
        UserError: unreadable, or what they decode to is not finite in ``dtype``.
    """
    try:
        with open(stored.file, "rb", buffering=0) as file:
            codes, scale = _read(file, stored), _scale(file, stored)
    except OSError as error:
        raise UserError(f"can't read {stored.file}: {error.strerror or error}") from error
    if not decodes_finite(codes, stored.dtype, scale, stored.rotation, dtype):
        raise _not_finite(stored)
    return codes, scale


def default_dtype(tensors: Iterable[Stored]) -> torch.dtype:
    """One dtype for a model: the smallest float of 16 bits or more in its file; bfloat16 if it is quantized.

    So the published 1K file, whose middle layers are bfloat16 values stored as F32 beside BF16, loads as bfloat16.
    """
    kinds = {"BF16" if where.quantized else where.dtype for where in tensors}
    return torch.bfloat16 if "BF16" in kinds else torch.float16 if "F16" in kinds else torch.float32


def fill(
    model: nn.Module, tensors: Mapping[str, Stored], dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Give ``model``, made on the meta device, the values of ``tensors`` (by its own keys), straight onto ``device``.

    Names and shapes must have been checked. A module that keeps its weight in a form of its own has
    ``load_weight(chunks, device)``, which is given the rows in fp32, or ``load_codes(codes, scale, device)``, which is
    given them as they are stored; ``dtype`` is that of all other parameters (None:
    `default_dtype`). What is trained and what isn't stays so.

    Raises:
        UserError: see `read_chunks`.
    """
    from tqdm import tqdm

    dtype = dtype or default_dtype(tensors.values())
    for key, where in tqdm(tensors.items(), desc="load", unit="tensor", leave=False, disable=not sys.stderr.isatty()):
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "weight" and hasattr(module, "load_codes"):
            module.load_codes(*read_codes(where, dtype), device)
        elif leaf == "weight" and hasattr(module, "load_weight"):
            module.load_weight(read_chunks(where, torch.float32), device)
        elif leaf in module._buffers:
            setattr(module, leaf, read_tensor(where, dtype, device))
        else:
            trained = getattr(module, leaf).requires_grad
            setattr(module, leaf, nn.Parameter(read_tensor(where, dtype, device), requires_grad=trained))


def _read(file: Any, stored: Stored, out: torch.Tensor | None = None) -> torch.Tensor:
    """The bytes of ``stored`` as a tensor of its shape and dtype; into ``out`` (contiguous, on the CPU) if given."""
    if out is None:
        out = torch.empty(codes_shape(stored), dtype=DTYPES[stored.dtype])
    if stored.numel:
        file.seek(stored.offset)
        view = memoryview(out.view(-1).view(torch.uint8).numpy())
        if file.readinto(view) != len(view):
            raise UserError(f"{stored.file} ends inside {stored.name}; download or copy it again")
    return out


def _dequantized(file: Any, stored: Stored) -> torch.Tensor:
    return decode(_read(file, stored), stored.dtype, _scale(file, stored), stored.rotation).view(stored.shape)


def _scale(file: Any, stored: Stored) -> torch.Tensor | None:
    """fp32."""
    if stored.scale is None:
        return None
    if stored.scale.file == stored.file:
        return _read(file, stored.scale).float()
    with open(stored.scale.file, "rb", buffering=0) as other:  # another shard
        return _read(other, stored.scale).float()


def _check_finite(stored: Stored, out: torch.Tensor, source: torch.Tensor) -> None:
    if is_finite(out):
        return
    if out.dtype == torch.float16 and source.float().isfinite().all():
        raise UserError(f"{stored.file}: {stored.name} has values beyond float16's range; use bfloat16")
    raise _not_finite(stored)


def _not_finite(stored: Stored) -> UserError:
    return UserError(
        f"{stored.file}: {stored.name} holds NaN or infinite values: the file is damaged or its training diverged; "
        "get it again, or take an earlier training step"
    )
