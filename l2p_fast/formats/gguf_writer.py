"""Writing one GGUF file, a piece at a time, with the gguf package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import atomic_path
from .write import DTYPE_NAMES, Piece, bytes_of_chunk

ARCHITECTURE = {"zimage": "lumina2"}  # as ComfyUI-GGUF calls them; stable-diffusion.cpp goes by the tensors' names
FILE_TYPES = {"Q8_0": 7, "Q4_K": 14}  # llama.cpp's numbers of files that are mostly so; 32: BF16


def write_gguf(named: Mapping[str, Piece], path: str | Path, metadata: Mapping[str, str], source: str) -> int:
    """Write pieces by the file's own names, atomically. Returns the file's bytes.

    Args:
        named: name -> piece, plain (F32, F16, BF16) or packed.
        metadata: texts to keep, by key.
        source: row of `variants.SOURCES` that the model is of.

    Raises:
        UserError: no gguf package, ``path`` can't be written, or a tensor holds NaN or Inf (nothing is left then).
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("writing GGUF needs the gguf package: pip install l2p_fast[gguf]") from error
    from tqdm import tqdm

    packings = [piece.packing for piece in named.values() if piece.packing]
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE[source])
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(FILE_TYPES[max(set(packings), key=packings.count)] if packings else 32)
            for key, text in metadata.items():
                writer.add_string(key, text)
            for name, piece in named.items():
                kind = piece.packing or DTYPE_NAMES[piece.dtype]
                # A dtype that isn't bytes: the shape counts values then.
                writer.add_tensor_info(
                    name, piece.shape, np.dtype(np.float16), piece.nbytes, gguf.GGMLQuantizationType[kind]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file, total = writer.fout[0], sum(piece.nbytes for piece in named.values())
            writer.write_padding(file, file.tell())
            with tqdm(
                total=total, desc="write", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
            ) as bar:
                for name, piece in named.items():
                    start = file.tell()
                    for chunk in piece.chunks(piece.dtype):
                        bar.update(file.write(bytes_of_chunk(name, chunk)))
                    if file.tell() - start != piece.nbytes:
                        raise UserError(f"{path}: {name} has {file.tell() - start:,} bytes instead of {piece.nbytes:,}")
                    writer.write_padding(file, piece.nbytes)
            size = file.tell()
        finally:
            writer.close()
    return size
