"""What this CPU is fast at. ``L2P_CPU=avx2`` hides all above AVX2, so that one machine can test both kinds.

The switch is read here and by the extension. PyTorch's libraries have switches of their own: tests/conftest.py.
"""

from __future__ import annotations

import functools
import os

import torch

from ..errors import UserError


@functools.cache
def cpu_has_fast_bf16() -> bool:
    """Whether bfloat16 products pay on this CPU: without AVX-512 or Arm's bfloat16 they take ten times fp32's time.

    Raises:
        UserError: ``L2P_CPU`` is set to anything but avx2.
    """
    pretended = os.environ.get("L2P_CPU", "")
    if pretended not in ("", "avx2"):
        raise UserError(f"L2P_CPU must be avx2 or unset, got {pretended!r}")
    if pretended:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What values of ``dtype`` are multiplied in on ``device``: float32 where bfloat16 is slow, else ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_fast_bf16() else dtype
