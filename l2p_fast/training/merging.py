"""What a training or a LoRA gives, put over its base: the tensors of a whole checkpoint, made as they are written.

Nothing of a base is read before its turn, so memory stays small. PyTorch is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, few
from ..formats.checkpoint import Checkpoint
from ..formats.shapes import Shapes, misshapen

if TYPE_CHECKING:
    import torch

    from ..formats.changes import Change
    from ..formats.write import Piece
    from .state import TrainedTensors


@dataclass
class Trained:
    """What is to be put over a base.

    Attributes:
        source: the file, or the checkpoint of a training.
        whole: keys of the tensors that replace the base's.
        changes: what is added to the base's, by layer.
    """

    source: Checkpoint | TrainedTensors
    whole: list[str]
    changes: Mapping[str, Change]

    def changed(self, wanted: Shapes) -> list[str]:
        """Keys of the base's tensors that `changes` are added to."""
        weights = [
            name if name in wanted else f"{name}.weight" for name, c in self.changes.items() if c.kind is not None
        ]
        return weights + [f"{name}.bias" for name, change in self.changes.items() if change.bias is not None]


def open_trained(path: str, ema: bool, wanted: Shapes) -> Trained:
    """Open a training's output, its checkpoint or a LoRA, for a base whose tensors are ``wanted``.

    Raises:
        UserError: it is none of these, or does not fit the base.
    """
    source = _open(path, ema)
    if isinstance(source, Checkpoint) and source.is_lora:
        from ..formats.lora import read_lora

        changes = read_lora(wanted, path)
        lacking = [name for name, c in changes.items() if c.bias is not None and f"{name}.bias" not in wanted]
        if lacking:
            raise UserError(f"{path} adds biases that the base lacks ({few(lacking)}); take it as --lora when sampling")
        return Trained(source, [], changes)
    whole, changes = list(source.shapes), {}
    if not isinstance(source, Checkpoint):
        from .pairs import changes_of, is_of_pair

        whole, changes = [name for name in whole if not is_of_pair(name)], changes_of(source)
    shapes = {key: source.shapes[key] for key in whole}
    shapes |= {f"{name}.weight": change.kind.fits for name, change in changes.items()}
    unknown = [source.tensors[key].name if key in source.tensors else key for key in shapes if key not in wanted]
    for bad, problem in ((unknown, "not in the base"), (misshapen(shapes, wanted), "misshapen")):
        if bad:
            raise UserError(
                f"{source.path}: {len(bad)} tensors are {problem} ({few(bad)}); "
                "give the base it was trained from (same patch size)"
            )
    return Trained(source, whole, changes)


def _open(path: str, ema: bool) -> Checkpoint | TrainedTensors:
    if Path(path).is_dir():
        from .state import TrainedTensors, is_training_checkpoint

        if is_training_checkpoint(path):
            return TrainedTensors(path, ema)
    if ema:
        raise UserError(f"--ema goes with a checkpoint folder of a training run; {path} is none")
    return Checkpoint(path)


def merged_pieces(
    base: Checkpoint, trained: Trained, wanted: Shapes, scale: float, dtype: torch.dtype | None
) -> dict[str, Piece]:
    """Every tensor of the base, replaced or changed (at strength ``scale``) where ``trained`` says so."""
    from ..formats.write import Piece

    source, pieces = trained.source, {}
    for key in wanted:
        if key in trained.whole:
            own = isinstance(source, Checkpoint)
            pieces[key] = Piece.of_checkpoint(source, key, dtype) if own else source.piece(key, dtype)
        else:
            pieces[key] = Piece.of_checkpoint(base, key, dtype)
    for key in trained.changed(wanted):
        change = trained.changes[key if key in trained.changes else key.rpartition(".")[0]]
        pieces[key] = _changed(base, key, pieces[key], change, scale)
    return pieces


def _changed(base: Checkpoint, key: str, piece: Piece, change: Change, scale: float) -> Piece:
    import torch

    from ..formats.write import Piece

    def chunks(kind: torch.dtype) -> Iterator[torch.Tensor]:
        weight = base.tensor(key, torch.float32)
        more = scale * change.bias if key.endswith(".bias") else change.added(weight, scale)
        yield (weight + more).to(kind)

    return Piece(piece.shape, piece.dtype, chunks)


# --- LoRA files ------------------------------------------------------------------------------------------------------
# Program -> what stands before a layer's name, and whether to_q, to_k and to_v lie fused.
LORA_LAYOUTS = {
    "comfyui": ("diffusion_model.", True),
    "ai-toolkit": ("diffusion_model.", False),
    "diffusers": ("transformer.", False),
}


def lora_pieces(base: Checkpoint, trained: Trained, layout: str, dtype: torch.dtype | None) -> dict[str, Piece]:
    """The tensors of a LoRA file in a layout of `LORA_LAYOUTS`, strength folded in: alpha is rank.

    ``dtype`` None: that of the source. In a fused layout the pairs of to_q, to_k and to_v are one of three times the
    rank, or of theirs, where they share the first matrix.

    Raises:
        UserError: there is no LoRA, one of another kind than plain pairs, or no such layout for models like ``base``.
    """
    from ..formats.lora import fused_pairs
    from ..formats.write import Piece

    source = trained.source.path
    if layout != "diffusers" and not base.layout.other_names:
        raise UserError(f"a LoRA of {base.layout.source.title} has no {layout} names; give --layout diffusers")
    if not trained.changes:
        raise UserError(f"{source} holds no LoRA; `convert merge` or `convert export` takes whole weights")
    other = [name for name, change in trained.changes.items() if not change.is_plain]
    if other:
        raise UserError(f"{source}: {few(other)} are no plain low-rank pairs, which alone are written; merge it")
    pairs = {name: change.kind for name, change in trained.changes.items()}
    dtype = dtype or (trained.source.default_dtype if isinstance(trained.source, Checkpoint) else trained.source.dtype)
    (prefix, fused), pieces = LORA_LAYOUTS[layout], {}
    for name, pair in (fused_pairs(pairs) if fused else pairs).items():
        for part, matrix in (("A", pair.down), ("B", pair.up)):
            pieces[f"{prefix}{name}.lora_{part}.weight"] = Piece.of_tensor(matrix, dtype)
    return pieces
