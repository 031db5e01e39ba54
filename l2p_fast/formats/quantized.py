"""Quantized weights: which scale, note and rotation belongs to which weight. Loads no torch; `values` applies them.

Known: INT8 with one scale or one a row, also rotated (ConvRot), and float8 with or without a scale, as ComfyUI,
ComfyUI-INT8-Fast and convert_to_quant write them. Anything a note says beyond that is refused, not guessed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..errors import UserError, few
from .header import AGAIN, FLOATS, Stored, parse_json
from .names import strip_prefix

SCALE_NAMES = ("weight_scale", "scale_weight")  # today's and the older name
NOTE_NAME = "comfy_quant"
OF_BITSANDBYTES = re.compile(r"\.(quant_state\.bitsandbytes__\w+|SCB)$")
FOR_ACTIVATIONS = ("input_scale", "scale_input")  # of no use here: activations stay as they are
FORMATS = {"int8_tensorwise": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# Keys of a note that change nothing in the weight: what they tell, dtypes and shapes tell as well.
HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_channel", "per_row", "scale_dtype"}
ROTATION, GROUP = "convrot", "convrot_groupsize"
GROUPS = (4, 16, 64, 256, 1024, 4096)  # a power of 4, as the regular Hadamard matrix needs
NOTE_LIMIT = 1 << 16  # bytes
# What can be written: the format's name -> how a file of it ends. `quantize.export` makes them.
EXPORTS = {"int8-convrot": ".safetensors", "fp8": ".safetensors", "q8_0": ".gguf", "q4_k": ".gguf"}


def attach_scales(stored: dict[str, Stored], metadata: dict[str, str], path: Path) -> dict[str, Stored]:
    """The tensors of ``stored`` with scales and rotations attached to the weights they belong to.

    Raises:
        UserError: a scale, a note or a weight without the other, or a quantization that is not known.
    """
    if any(OF_BITSANDBYTES.search(name) for name in stored):
        raise UserError(
            f"{path} is quantized by bitsandbytes, which is not read; take full weights and --quantize 4bit"
        )
    notes = _notes_in(metadata, path)
    plain, scales = {}, {}
    for name, where in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf in SCALE_NAMES:
            scales[module] = where
        elif leaf == NOTE_NAME:
            notes[module] = _read_note(where)
        elif leaf not in FOR_ACTIVATIONS and name != "scaled_fp8":
            plain[name] = where
    stray = sorted(module for module in scales.keys() | notes.keys() if f"{module}.weight" not in plain)
    if stray:
        raise UserError(f"{path} has a quantization scale or note without its weight ({few(stray)}); {AGAIN}")
    for name, where in plain.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            if where.dtype == "I8":
                raise UserError(f"{path}: {name} is INT8, and only weights may be; {AGAIN}")
            continue
        scale, note = scales.get(module), notes.get(module)
        rotation = 0 if note is None else _rotation(note, where, path)
        if scale is not None and not where.quantized:
            raise UserError(f"{path}: {name} is {where.dtype} but has a scale; only INT8 and float8 weights take one")
        if scale is None and where.dtype == "I8":
            raise UserError(f"{path}: {name} is INT8 without its weight_scale; {AGAIN}")
        if scale is not None:
            scale = _checked_scale(scale, where, path)
        plain[name] = dataclasses.replace(where, scale=scale, rotation=rotation)
    return plain


def _notes_in(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        found = parse_json(metadata.get("_quantization_metadata", "{}"))
        return {strip_prefix(layer): note for layer, note in found.get("layers", {}).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has damaged quantization metadata ({error}); {AGAIN}") from error


def _read_note(where: Stored) -> Any:
    if where.nbytes > NOTE_LIMIT:
        raise UserError(f"{where.file}: {where.name} has {where.nbytes:,} bytes, which is no note; {AGAIN}")
    try:
        with open(where.file, "rb") as file:
            file.seek(where.offset)
            return parse_json(file.read(where.nbytes))
    except OSError as error:
        raise UserError(f"can't read {where.file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{where.file}: {where.name} is not JSON ({error}); {AGAIN}") from error


def _rotation(note: Any, where: Stored, path: Path) -> int:
    """The ConvRot group size of a note (0: none), refusing what can't be undone."""
    known = f"supported: {', '.join(FORMATS)}; use another version of the file"
    of_dtype = next((form for form, dtype in FORMATS.items() if dtype == where.dtype), None)
    form = note.get("format", of_dtype) if isinstance(note, dict) else note  # older notes don't name it
    if not isinstance(note, dict) or form not in FORMATS:
        raise UserError(f"{path}: {where.name} has quantization format {form!r:.40}; {known}")
    if where.dtype != FORMATS[form]:
        raise UserError(f"{path}: {where.name} is {where.dtype} but its note says {form}; {AGAIN}")
    rotated = bool(note.get(ROTATION))
    size = note.get(GROUP, 256) if rotated else 0
    strange = [key for key, value in note.items() if value and key not in HARMLESS | {ROTATION, GROUP}]
    columns = where.shape[-1] if len(where.shape) == 2 else 0
    if strange or (rotated and (type(size) is not int or size not in GROUPS or not columns or columns % size)):
        raise UserError(f"{path}: {where.name} has quantization {json.dumps(note):.200}; {known}")
    return size


def _checked_scale(scale: Stored, where: Stored, path: Path) -> Stored:
    """``scale`` as one number, or one a row."""
    rows = where.shape[0] if where.shape else 1
    if scale.numel not in (1, rows) or max(scale.shape, default=1) != scale.numel or scale.dtype not in FLOATS:
        raise UserError(
            f"{path}: {scale.name} is {scale.dtype} {list(scale.shape)}; "
            f"wanted one F32 number, or one per row ({rows},); get another version of the file"
        )
    return dataclasses.replace(scale, shape=(rows,)) if scale.numel == rows else scale
