"""Custom operators. Each works without the compiled extension: PyTorch's dispatcher then runs the plain reference.

The schema, the reference, the shape function and the backward of an op live in its Python file; ``l2p_fast/_C.abi3.so``
adds CPU and CUDA kernels for it. Set ``L2P_EXTENSION=0`` to leave the extension out, ``L2P_CPU=avx2`` to leave out what
needs more than AVX2.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from .activate import activate, activate_reference
from .cpu import cpu_has_fast_bf16, product_dtype
from .head import (
    DecoderWeights,
    EncoderWeights,
    decoder_weights,
    encoder_weights,
    fused_levels,
    head_decode,
    head_decode_reference,
    head_encode,
    head_encode_reference,
    head_obstacle,
)
from .linear import Linear, linear
from .norm import (
    Rope,
    apply_rope,
    gate_norm_residual,
    gate_norm_residual_reference,
    norm_modulate,
    norm_modulate_quantize,
    norm_modulate_quantize_reference,
    norm_modulate_reference,
    qk_norm_rope,
    qk_norm_rope_reference,
    rms_norm,
)
from .patchify import patchify, patchify_reference, unpatchify, unpatchify_reference
from .rows import QuantizedRows, quantize_rows
from .silu import silu_mul, silu_mul_reference
from .update import euler_step, euler_step_, euler_step_reference, to_uint8, to_uint8_reference

__all__ = [
    "Linear",
    "DecoderWeights",
    "EncoderWeights",
    "QuantizedRows",
    "Rope",
    "activate",
    "activate_reference",
    "apply_rope",
    "build_info",
    "cpu_has_fast_bf16",
    "decoder_weights",
    "encoder_weights",
    "euler_step",
    "euler_step_",
    "euler_step_reference",
    "extension_status",
    "fused_levels",
    "gate_norm_residual",
    "gate_norm_residual_reference",
    "head_decode",
    "head_decode_reference",
    "head_encode",
    "head_encode_reference",
    "head_obstacle",
    "linear",
    "norm_modulate",
    "norm_modulate_quantize",
    "norm_modulate_quantize_reference",
    "norm_modulate_reference",
    "patchify",
    "patchify_reference",
    "product_dtype",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "quantize_rows",
    "rms_norm",
    "silu_mul",
    "silu_mul_reference",
    "to_uint8",
    "to_uint8_reference",
    "unpatchify",
    "unpatchify_reference",
]

_PACKAGE = Path(__file__).resolve().parent.parent
_PLAIN = "plain PyTorch paths are used"


@functools.cache
def _load_extension() -> str | None:
    """Load the compiled kernels once. None, or why they are not there."""
    if os.environ.get("L2P_EXTENSION", "1") == "0":
        return "switched off by L2P_EXTENSION=0"
    library = _PACKAGE / "_C.abi3.so"
    if not library.exists():
        note = _PACKAGE / "_not_built.txt"  # written by setup.py
        why = note.read_text().strip() if note.exists() else f"no {library.name} in {_PACKAGE}"
        return f"not built: {why}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"failed to load: {' '.join(str(error).split())}"
    return None


_load_extension()


def build_info() -> dict[str, object]:
    """How the extension was built: compiler, CUDA version, architectures, PyTorch, flags. Empty when it was not.

    The report is a module of its own, made for one Python version, unlike the kernels, which any Python loads.
    """
    try:
        from .. import _build
    except ImportError:
        return {}
    return _build.info()


def extension_status() -> str:
    """One line: whether the compiled kernels are in use and for which devices, and if not, why."""
    problem = _load_extension()
    if problem is not None:
        return f"{problem}; {_PLAIN}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("l2p_fast::patchify", "CUDA"):
        return "loaded (CPU kernels only)"
    return " ".join(["loaded (CPU and CUDA kernels", *build_info().get("cuda_architectures", [])]) + ")"
