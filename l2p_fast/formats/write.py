"""Writing one safetensors file, a piece at a time: memory stays small whatever the size of the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import atomic_path
from .checkpoint import METADATA_KEY, Checkpoint
from .header import PACKED, bytes_of
from .names import LAYOUTS, to_layout
from .sources import NOT_IN_SHAPES
from .values import DTYPES, is_finite

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in PACKED}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor to be written: its shape, its dtype, and its rows as CPU tensors of that dtype, made when asked for.

    ``packing`` is one of `PACKED` where the rows are its bytes; the shape counts values all the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[torch.dtype], Iterator[torch.Tensor]]
    packing: str = ""

    @property
    def nbytes(self) -> int:
        return bytes_of(self.packing or DTYPE_NAMES[self.dtype], math.prod(self.shape))

    @staticmethod
    def of_checkpoint(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None = None) -> Piece:
        where = checkpoint.tensors[key]
        return Piece(where.shape, dtype or checkpoint.dtype_of(key), lambda kind: checkpoint.chunks(key, kind))

    @staticmethod
    def of_tensor(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Piece:
        return Piece(tuple(tensor.shape), dtype or tensor.dtype, lambda kind: iter([tensor.detach().to("cpu", kind)]))

    @staticmethod
    def of_init(key: str, shape: tuple[int, ...], fan_in: int, seed: int, dtype: torch.dtype) -> Piece:
        """A new tensor: uniform in +-1/sqrt(fan_in), PyTorch's default for a Linear or Conv2d and for its bias.

        Drawn in fp32 from a generator seeded by the first 8 bytes of sha256("{seed}:{key}"), so a tensor depends on its
        own name and ``seed`` alone.
        """
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        bound = fan_in**-0.5

        def draw(kind: torch.dtype) -> Iterator[torch.Tensor]:
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            yield torch.empty(shape).uniform_(-bound, bound, generator=generator).to(kind)

        return Piece(shape, dtype, draw)

    @staticmethod
    def fused(parts: list[Piece]) -> Piece:
        """``parts`` row after row in one tensor, in the dtype that holds them all exactly."""
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return Piece(shape, dtype, lambda kind: (chunk for part in parts for chunk in part.chunks(kind)))


def write_pieces(
    pieces: Mapping[str, Piece],
    path: str | Path,
    layout: str = "published",
    prefix: str = "",
    config: Mapping[str, Any] | None = None,
) -> int:
    """Write ``pieces`` (by our keys) as one safetensors file, atomically, a chunk at a time. Returns its bytes.

    Args:
        pieces: our key -> `Piece`.
        path: the file to write.
        layout: ``published`` (our names) or ``comfyui`` (fused ``qkv``, short names).
        prefix: put before every name, such as ``model.diffusion_model.``.
        config: constructor arguments that shapes don't tell; kept in the metadata.

    Raises:
        UserError: an unknown layout, ``path`` can't be written, or a tensor holds NaN or Inf (nothing is left then).
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    named: dict[str, Piece] = {}
    for name, keys in to_layout(pieces, layout, prefix).items():
        named[name] = pieces[keys[0]] if len(keys) == 1 else Piece.fused([pieces[key] for key in keys])
    return write_named(named, path, kept_in_metadata(config))


def kept_in_metadata(config: Mapping[str, Any] | None) -> dict[str, str]:
    """Metadata of a file whose model has ``config``: what shapes don't tell."""
    kept = {key: value for key, value in (config or {}).items() if key in NOT_IN_SHAPES and value is not None}
    return {METADATA_KEY: json.dumps(kept, sort_keys=True)} if kept else {}


def bytes_of_chunk(name: str, chunk: torch.Tensor) -> memoryview:
    """The bytes of a piece's rows.

    Raises:
        UserError: they hold NaN or infinite values.
    """
    if not is_finite(chunk):
        beyond = ", or values beyond float16's range" if chunk.dtype == torch.float16 else ""
        raise UserError(f"{name} holds NaN or infinite values{beyond}; nothing was written")
    return memoryview(chunk.contiguous().view(-1).view(torch.uint8).numpy())


def write_named(named: Mapping[str, Piece], path: str | Path, metadata: Mapping[str, str]) -> int:
    """As `write_pieces`, of pieces by the file's own names."""
    from tqdm import tqdm

    # The order of the safetensors library: wide dtypes first, so that every tensor is aligned, then by name.
    order = sorted(named, key=lambda name: (-named[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        piece = named[name]
        header[name] = {
            "dtype": DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [end, end + piece.nbytes],
        }
        end += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        with tqdm(
            total=end, desc="write", unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
        ) as bar:
            for name in order:
                for chunk in named[name].chunks(named[name].dtype):
                    bar.update(file.write(bytes_of_chunk(name, chunk)))
        if file.tell() != 8 + len(text) + end:
            raise UserError(f"{path}: {file.tell():,} bytes written instead of {8 + len(text) + end:,}")
    return 8 + len(text) + end


def save_single_file(
    model_or_state: torch.nn.Module | Mapping[str, torch.Tensor],
    path: str | Path,
    layout: str = "published",
    prefix: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model, or a state dict by our keys, as one safetensors file that `load_model` and ComfyUI's layout know.

    Args:
        model_or_state: an `L2PTransformer2DModel` (its metadata then keeps what shapes don't tell) or a dict.
        path, layout, prefix: see `write_pieces`.
        dtype: cast to this; None keeps each tensor's own.

    Raises:
        UserError: see `write_pieces`; NaN or infinite values.
    """
    state, config = model_or_state, None
    if isinstance(model_or_state, torch.nn.Module):
        state, config = model_or_state.state_dict(), dict(model_or_state.config)
    write_pieces({key: Piece.of_tensor(value, dtype) for key, value in state.items()}, path, layout, prefix, config)
