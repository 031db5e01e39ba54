"""Codes -> values: what a quantized weight means, on whatever device its codes are.

INT8 and float8 are multiplied by their scale and rotated back (ConvRot); GGUF's types are unpacked by diffusers'
functions, which need the gguf package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .header import PACKED, Stored

LARGEST = {"I8": 128.0, "F8_E4M3": 448.0, "F8_E5M2": 57344.0}


def codes_shape(stored: Stored) -> tuple[int, ...]:
    """Shape of a tensor as it is stored: of a packed type the last dimension counts bytes."""
    if packing := PACKED.get(stored.dtype):
        return (*stored.shape[:-1], stored.shape[-1] // packing.values * packing.size)
    return stored.shape


def decode(codes: Tensor, dtype: str, scale: Tensor | None = None, rotation: int = 0) -> Tensor:
    """The values of ``codes``; in fp32 where they are quantized.

    Args:
        codes: (N, ...), as stored.
        dtype: what they are, as in `Stored`.
        scale: fp32, one or N.
        rotation: size of the groups of columns that a Hadamard matrix has rotated; 0: none.

    Raises:
        UserError: a type of GGUF's, and the gguf package is not installed.
    """
    values = codes if dtype not in PACKED else _unpacked(codes, dtype)
    if scale is not None:
        values = values.float() * (scale.view(-1, *[1] * (values.dim() - 1)) if scale.numel() > 1 else scale.view(()))
    if rotation:
        values = rotate(values.float(), rotation)
    return values


def decodes_finite(codes: Tensor, dtype: str, scale: Tensor | None, rotation: int, to: torch.dtype) -> bool:
    """Whether `decode` gives finite values of the dtype ``to``, told without decoding: in fp16, GGUF's may not."""
    if packing := PACKED.get(dtype):
        scales = codes.reshape(-1, packing.size)[:, packing.scales].contiguous().view(torch.float16)
        return bool(scales.isfinite().all())
    if dtype != "I8" and not bool(codes.float().isfinite().all()):
        return False
    largest = LARGEST[dtype] * (rotation or 1) ** 0.5 * (1.0 if scale is None else float(scale.abs().max()))
    return largest <= torch.finfo(to).max  # not so of NaN


def rotate(values: Tensor, size: int) -> Tensor:
    """Each group of ``size`` columns of ``values`` times the Hadamard matrix; twice is not at all."""
    return (values.unflatten(-1, (-1, size)) @ hadamard(size).to(values)).flatten(-2)


@functools.lru_cache(maxsize=4)
def hadamard(size: int) -> torch.Tensor:
    """The regular Hadamard matrix (size, size), symmetric and its own inverse; ``size`` a power of 4 (ConvRot)."""
    seed = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return matrix


def _unpacked(codes: Tensor, dtype: str) -> Tensor:
    """(..., bytes of a row) -> (..., K)."""
    packing = PACKED[dtype]
    values = functions()[dtype](codes.reshape(-1, packing.size), packing.values, packing.size, torch.float32)
    return values.reshape(*codes.shape[:-1], -1)


@functools.cache
def functions() -> dict[str, Callable[..., Tensor]]:
    """Diffusers' functions by the type's name: blocks (n, bytes) -> (n, values)."""
    try:
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions
    except ImportError as error:
        raise UserError("GGUF files need the gguf package: pip install l2p_fast[gguf]") from error
    return {dtype: dequantize_functions[gguf.GGMLQuantizationType[dtype]] for dtype in PACKED}
