"""Whole checkpoints in fewer bits, written as ComfyUI and stable-diffusion.cpp read them.

Rounded are the blocks' linear layers: head, embeddings, norms and the layers for the timestep stay in bf16.
The formats are INT8 with a scale a row, rotated (ConvRot), float8 with a scale a tensor, and GGUF's Q8_0 and Q4_K. Each
is made piece by piece while it is written.

N rows, K columns.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..formats.decode import LARGEST, rotate
from ..formats.header import PACKED
from ..formats.names import to_layout
from ..formats.quantized import GROUP, GROUPS, NOTE_NAME, ROTATION, SCALE_NAMES
from ..formats.write import Piece
from .products import MULTIPLE, encode, is_quantized

PACKINGS = {"q8_0": "Q8_0", "q4_k": "Q4_K"}  # of the formats that are GGUF's
LARGEST_GROUP = 256  # columns that ComfyUI rotates together
STEPS = 8  # scales that are tried for a block of Q4_K
AT_ONCE = 1 << 18  # values that are fitted at a time, so that they stay near the processor


def rounded_keys(model: nn.Module) -> set[str]:
    """Our keys of the weights of ``model`` (meta will do) that are written in fewer bits."""
    return {
        f"{name}.{path}.weight" for name, block in model.blocks() for path, layer in block.named_modules()
        if is_quantized(layer, "int8") and not any(word in path for word in model.of_time)
    }  # fmt: skip


def rounded_pieces(pieces: Mapping[str, Piece], keys: Collection[str], form: str, prefix: str = "") -> dict[str, Piece]:
    """``pieces`` (by our keys) by ComfyUI's names, those of ``keys`` in the format ``form``; what must follow, too.

    Raises:
        UserError: no weight has sizes that the format takes.
    """
    named: dict[str, Piece] = {}
    count = 0
    for name, ours in to_layout(pieces, "comfyui", prefix).items():
        piece = pieces[ours[0]] if len(ours) == 1 else Piece.fused([pieces[key] for key in ours])
        made = _rounded(piece, form) if set(ours) <= set(keys) else {}
        count += bool(made)
        if form in PACKINGS and len(piece.shape) < 2:
            piece = Piece(piece.shape, torch.float32, piece.chunks)  # ggml computes norms and biases in F32
        module = name.removesuffix("weight")
        named |= {name: piece} if not made else {leaf and module + leaf or name: part for leaf, part in made.items()}
    if not count:
        raise UserError(f"no weight has rows that {form} takes; leave --quantize out")
    return named


def _rounded(piece: Piece, form: str) -> dict[str, Piece]:
    """What a weight becomes, by the ends of names, "" for the weight itself; nothing where its sizes don't fit."""
    columns = piece.shape[-1]
    if form in PACKINGS:
        # Rows that aren't whole blocks of 256 take those of 32.
        fitting = (kind for kind in (PACKINGS[form], "Q8_0") if columns % PACKED[kind].values == 0)
        kind = next(fitting, None)
        return {} if kind is None else {"": _packed(piece, kind)}
    if columns % MULTIPLE:
        return {}
    if form == "fp8":
        return _fp8(piece)
    group = max((size for size in GROUPS if size <= LARGEST_GROUP and columns % size == 0), default=0)
    return _int8(piece, group)


def _int8(piece: Piece, group: int) -> dict[str, Piece]:
    def coded() -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in piece.chunks(torch.float32):
            yield encode(rotate(chunk, group) if group else chunk, torch.int8)

    note = {"format": "int8_tensorwise"} | ({ROTATION: True, GROUP: group} if group else {})
    return {
        "": Piece(piece.shape, torch.int8, lambda _: (codes for codes, _ in coded())),
        SCALE_NAMES[0]: Piece((piece.shape[0], 1), torch.float32, lambda _: (scale for _, scale in coded())),
        NOTE_NAME: _note(note),
    }


def _fp8(piece: Piece) -> dict[str, Piece]:
    @functools.cache
    def scale() -> Tensor:
        largest = max(float(chunk.abs().max()) for chunk in piece.chunks(torch.float32))
        return torch.tensor(max(largest, 1e-12) / LARGEST["F8_E4M3"])

    def coded(dtype: torch.dtype) -> Iterator[Tensor]:
        return ((chunk / scale()).to(dtype) for chunk in piece.chunks(torch.float32))

    return {
        "": Piece(piece.shape, torch.float8_e4m3fn, coded),
        SCALE_NAMES[0]: Piece((), torch.float32, lambda _: iter([scale()])),
        NOTE_NAME: _note({"format": "float8_e4m3fn"}),
    }


def _note(note: Mapping[str, object]) -> Piece:
    return Piece.of_tensor(torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8))


# --- GGUF ------------------------------------------------------------------------------------------------------------
def _packed(piece: Piece, kind: str) -> Piece:
    pack: Callable[[Tensor], Tensor] = {"Q8_0": pack_q8_0, "Q4_K": pack_q4_k}[kind]
    return Piece(piece.shape, torch.uint8, lambda _: map(pack, piece.chunks(torch.float32)), packing=kind)


def pack_q8_0(x: Tensor) -> Tensor:
    """x (N, K) fp32 -> (N, bytes of a row): 32 values and their scale, as the gguf package rounds them."""
    import gguf

    return torch.from_numpy(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0))


def pack_q4_k(x: Tensor) -> Tensor:
    """x (N, K) fp32 -> (N, bytes of a row).

    Eight groups of 32 values share two fp16 scales; each has a scale and an offset of 6 bits of its own, and its values
    have 4: x = d s q - m o, with q from 0 to 15 and d, s, m, o not negative.
    """
    blocks = x.reshape(-1, 8, 32)
    parts = [_pack_blocks(part) for part in blocks.split(AT_ONCE // 256)]
    return torch.cat(parts).reshape(len(x), -1)


def _pack_blocks(x: Tensor) -> Tensor:
    """(n, 8, 32) -> (n, 144)."""
    scale, offset = _fit(x)
    largest = torch.stack([scale.amax(-1), offset.amax(-1)], dim=-1)  # (n, 2)
    halves = (largest / 63).half()
    unit = halves.float().unsqueeze(1)
    steps = torch.stack([scale, offset], dim=-1) / unit.clamp(min=1e-30)
    steps = steps.round_().clamp_(0, 63)  # (n, 8, 2)
    scale, offset = (steps * unit).unbind(-1)
    values = (x + offset.unsqueeze(-1)) / scale.clamp(min=1e-30).unsqueeze(-1)
    values = values.round_().clamp_(0, 15).to(torch.uint8).unflatten(1, (4, 2))
    steps = steps.to(torch.uint8)
    low, high = steps[:, :4], steps[:, 4:]  # of the first and the last four groups
    first = low | (high >> 4 << 6)  # (n, 4, 2)
    last = (high[..., 0] & 15) | (high[..., 1] & 15) << 4
    packed = values[:, :, 0] | values[:, :, 1] << 4
    return torch.cat([halves.view(torch.uint8), first[..., 0], first[..., 1], last, packed.flatten(1)], dim=1)


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset, neither negative, of each group (..., 32): x = scale q - offset with q from 0 to 15.

    Several scales are tried; of the values that each gives, scale and offset are fitted anew by least squares, large
    values weighing more, and the best pair is kept.
    """
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True)
    span = (high - low).clamp(min=1e-30)
    weight = x.abs() + x.square().mean(-1, keepdim=True).sqrt()
    total, first = weight.sum(-1, keepdim=True), (weight * x).sum(-1, keepdim=True)
    best_scale, best_low, best = span / 15, low, torch.full_like(low, math.inf)
    for step in range(STEPS):
        largest = 14 + 2 * step / (STEPS - 1)
        q = ((x - low) * (largest / span)).round_().clamp_(0, 15)
        weighted = weight * q
        one, two, mixed = (part.sum(-1, keepdim=True) for part in (weighted, weighted * q, weighted * x))
        determinant = total * two - one * one
        alike = determinant <= 1e-5 * total * two  # hardly two different q: nothing to fit
        scale = torch.where(alike, span / largest, (total * mixed - first * one) / determinant)
        offset = torch.where(alike, low, (two * first - one * mixed) / determinant)
        above = offset > 0
        scale = torch.where(above, mixed / two.clamp(min=1e-30), scale).clamp_(min=0)
        offset = offset.masked_fill_(above, 0)
        error = (weight * (scale * q + offset - x).square()).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, offset, best_low)
    return best_scale.squeeze(-1), best_low.squeeze(-1).neg().clamp_(min=0)
