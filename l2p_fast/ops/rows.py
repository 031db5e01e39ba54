"""Rows of 8 bits: what one rounding of activations hands to all the 8-bit products that read them.

The plain form; `norm.norm_modulate_quantize` makes such rows in the pass that norms them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedRows(NamedTuple):
    """Values, each row rounded to 8 bits by a scale of its own.

    Attributes:
        values: (..., K) int8 or float8_e4m3fn.
        scale: (..., 1) fp32; ``values * scale`` is what was rounded.
        dtype: of what was rounded, and of the products with it.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


def quantize_rows(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Round x (..., K) row by row to int8 or float8_e4m3fn, the largest value of a row to the dtype's largest."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / largest
    scaled = x.float() / scale
    return QuantizedRows((scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale, x.dtype)
