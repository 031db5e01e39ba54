"""What a run keeps, so that it goes on as if it had never stopped.

    run/checkpoints/step-00000500/   state.json (plain values) and the tensors, PyTorch's distributed checkpoint

Each process writes its shards; any number of processes can read them. A checkpoint is written beside its place and
renamed when it is complete and on disk, so what bears its name is whole. PyTorch keeps its index as a pickle: that is
read here, by a reader that knows nothing but such an index.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from ..errors import UserError
from ..formats.header import Stored
from ..formats.write import Piece
from .parallel import Workers

STATE = "state.json"
INDEX = ".metadata"
MODEL, OPTIM, EMA = "model.", "optim.", "ema."
_FAILED = (OSError, RuntimeError, CheckpointException)


def folder_of(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def complete(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder_of(run).glob("step-*") if (path / STATE).exists())


def save(run: str | Path, tensors: dict[str, Tensor], state: Mapping[str, Any], keep: int, workers: Workers) -> Path:
    """Write a checkpoint of ``state["step"]`` and remove all but the last ``keep``.

    Raises:
        UserError: it can't be written; what was there before is untouched.
    """
    place = folder_of(run) / f"step-{state['step']:08d}"
    partial = place.with_name(f".{place.name}.partial")

    def prepare() -> None:
        if workers.first:
            for old in place.parent.glob(".step-*"):  # left by a killed run
                shutil.rmtree(old)
            partial.mkdir(parents=True)

    def write() -> None:
        with _quiet():
            dcp.save(tensors, checkpoint_id=partial, no_dist=workers.world == 1)

    def publish() -> None:
        if workers.first:
            with open(partial / STATE, "w") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            _sync(partial)
            if place.exists():
                shutil.rmtree(place)
            os.replace(partial, place)
            _sync(place.parent)

    for work in (prepare, write, publish):
        failure = None
        try:
            work()
        except _FAILED as error:
            failure = _reason(error)
        if workers.sum([failure is not None])[0]:  # all stop together
            if workers.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"can't write the checkpoint {place}: {failure or 'another process failed'}; "
                "make room or choose another run folder, and start again: earlier checkpoints are whole"
            )
    if workers.first:
        for old in complete(run)[:-keep]:
            gone = old.with_name(f".{old.name}.partial")  # so that no half-removed one bears the name
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
    return place


def read_state(path: str | Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads((Path(path) / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no complete checkpoint ({error}); name another, or --resume none") from error


def load(path: str | Path, tensors: dict[str, Tensor], workers: Workers) -> None:
    """Read the tensors of a checkpoint in place, whatever number of processes wrote them.

    Raises:
        UserError: it lacks some, has them in other shapes, or is damaged.
    """
    reader = Reader(path)
    held = reader.index()
    for name, tensor in tensors.items():
        if name not in held:
            raise UserError(f"the checkpoint {path} has no {name}; it is of another configuration")
        if tuple(held[name].size) != tuple(tensor.shape):
            raise UserError(
                f"the checkpoint {path} is of another model: {name} is {tuple(held[name].size)} there, "
                f"{tuple(tensor.shape)} here"
            )
    reader.load(tensors, workers.world == 1)


class _Index(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, and refuses what such an index doesn't hold."""

    def find_class(self, module: str, name: str) -> Any:
        known = module.startswith(("torch.distributed.checkpoint.", "pathlib")) or (module, name) in (
            ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
        )  # fmt: skip
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")


class Reader(dcp.FileSystemReader):
    """Reads tensors of a checkpoint, any number of times, after its index, once.

    Raises:
        UserError: it is damaged, or made to run code.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        try:
            with open(Path(path) / INDEX, "rb") as file:
                self._metadata: Metadata = _Index(file).load()
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(f"the checkpoint {path} is damaged: {error}; remove it, and try again") from error
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def index(self) -> dict[str, TensorStorageMetadata]:
        """The tensors by name: shapes and dtypes."""
        found = self._metadata.state_dict_metadata
        return {name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)}

    def load(self, tensors: dict[str, Tensor], alone: bool) -> None:
        """Fill ``tensors`` in place; ``alone``: this process by itself."""
        try:
            with _quiet():
                dcp.load(tensors, storage_reader=self, no_dist=alone)
        except _FAILED as error:
            raise UserError(
                f"the checkpoint {self.path} is damaged: {_reason(error)}; remove it, and try again"
            ) from error


class TrainedTensors:
    """The trained weights of a checkpoint, for `l2p_fast.convert merge`: the part of `Checkpoint`'s face it uses."""

    config: dict[str, Any] = {}

    def __init__(self, path: str | Path, average: bool = False):
        self.path, self._reader = Path(path), Reader(path)
        self._index = self._reader.index()
        self._prefix = EMA if average else MODEL
        names = [name for name in self._index if name.startswith(self._prefix)]
        if not names:
            raise UserError(f"{path} holds no average of the weights; it was trained without ema.decay")
        self.shapes = {name.removeprefix(self._prefix): tuple(self._index[name].size) for name in names}
        self.tensors = {key: Stored(self.path / STATE, key, "", shape, 0) for key, shape in self.shapes.items()}

    def kind(self) -> str:
        return "delta"

    def piece(self, key: str, dtype: torch.dtype | None = None) -> Piece:
        name = self._prefix + key
        stored = self._index[name].properties.dtype

        def chunks(kind: torch.dtype) -> Iterator[Tensor]:
            value = torch.empty(self.shapes[key], dtype=stored)
            self._reader.load({name: value}, alone=True)
            yield value.to(kind)

        return Piece(self.shapes[key], dtype or stored, chunks)


def is_training_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint's folder (a run's folder is none)."""
    return (Path(path) / INDEX).exists()


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "strerror", None) or error).splitlines()[0] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning that one process writes alone: it does so on purpose."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no_dist.*|.*torch.distributed is.*")
        yield
