"""Small GGUF files by the gguf package's own writer: the independent other side of `formats.gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")


def packed(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    """Random blocks of ``kind`` for a weight of ``shape``: any bytes, and scales that give it small values."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    halves = {"Q8_0": (0, 2), "Q6_K": (208, 210), "Q5_K": (0, 4), "Q4_K": (0, 4)}[kind]
    scales = rng.uniform(1e-5, 2e-5, (len(blocks), (halves[1] - halves[0]) // 2)).astype(np.float16)
    blocks[:, slice(*halves)] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path, tensors: Mapping[str, torch.Tensor | tuple[np.ndarray, str]], texts: Mapping[str, str] | None = None
) -> None:
    """Write plain tensors (F32, F16, BF16), and packed ones given as their bytes with the type's name."""
    writer = gguf.GGUFWriter(path, "lumina2")
    for key, text in (texts or {}).items():
        writer.add_string(key, text)
    writer.add_array("a.list.of.texts", ["one", "two"])
    writer.add_array("a.list.of.numbers", [1.5, 2.5])
    for name, value in tensors.items():
        if isinstance(value, tuple):
            data, kind = value[0], gguf.GGMLQuantizationType[value[1]]
        elif value.dtype == torch.bfloat16:
            data, kind = value.contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        else:
            data, kind = value.contiguous().numpy(), None
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def values_of(value: torch.Tensor | tuple[np.ndarray, str]) -> torch.Tensor:
    """What the gguf package says that a tensor of `write_gguf` means, in fp32."""
    if isinstance(value, torch.Tensor):
        return value.float()
    return torch.from_numpy(gguf.quants.dequantize(value[0], gguf.GGMLQuantizationType[value[1]]))
