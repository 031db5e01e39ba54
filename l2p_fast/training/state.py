"""What a run keeps, so that it goes on as if it had never stopped.

    run/checkpoints/step-00000500/   state.json: plain values and checksums; the tensors (`shards`)

Nothing but JSON and safetensors, so reading one can't run code. A checkpoint is written beside its place and renamed
when it is complete and on disk, so what bears its name was whole; the checksums show what happened to it since.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import regular
from ..formats.header import Stored
from ..formats.values import is_finite
from ..formats.write import Piece
from .parallel import DTYPES, Workers
from .shards import FILE, Damaged, Shards, digest_of, write

STATE = "state.json"
MAX_STATE = 1 << 28  # bytes of state.json, which names every unreadable image
MAX_STEP = 99_999_999
NAME = re.compile(r"step-\d{8}")  # of a checkpoint; nothing else in its folder is one
MODEL, OPTIM, EMA = "model.", "optim.", "ema."


@dataclass
class RunState:
    """Where a run stands: all that is no tensor."""

    step: int = 0  # steps done, those skipped as non-finite included
    updates: int = 0  # of the weights
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0  # of training
    world: int = 1  # processes
    rng: str = ""  # PyTorch's own generator, in hexadecimal digits
    data: dict[str, Any] = field(default_factory=dict)  # of the stream
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> RunState:
        """Raises ValueError for what `to_json` didn't write."""
        wanted = {f.name: type(getattr(cls(), f.name)) for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != wanted.keys():
            raise ValueError("the values of the run are not the expected ones")
        for name, kind in wanted.items():
            value = values[name]
            if type(value) is not kind or kind in (int, float) and not 0 <= value < 2**53:
                raise ValueError(f"{name} is not a {kind.__name__} from 0 on")
        step, cursors, bad = (values["data"].get(name) for name in ("step", "cursors", "bad"))
        if not (
            isinstance(cursors, list) and all(type(n) is int and 0 <= n < 2**53 for n in [step, *cursors])
            and isinstance(bad, list) and all(isinstance(name, str) for name in bad)
        ):  # fmt: skip
            raise ValueError("the state of the data is not the expected one")
        if len(bytes.fromhex(values["rng"])) != torch.get_rng_state().numel():
            raise ValueError("the state of the random generator is not the expected one")
        return cls(**values)

    def take_rng(self) -> None:
        self.rng = bytes(torch.get_rng_state().tolist()).hex()

    def give_rng(self) -> None:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(self.rng)), dtype=torch.uint8))


def folder_of(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def place_of(run: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is, if there is one."""
    return folder_of(run) / f"step-{step:08d}"


def complete(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = folder_of(run)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name) and (path / STATE).is_file())


def save(
    run: str | Path, tensors: dict[str, Tensor], state: RunState, keep: int, workers: Workers, best: Path | None = None
) -> Path:
    """Write a checkpoint of ``state.step`` and remove all but the last ``keep`` and ``best``.

    Raises:
        UserError: it can't be written; what was there before is untouched.
    """
    place = place_of(run, state.step)
    partial = place.with_name(f".{place.name}.partial")
    mine = f"rank-{workers.rank:05d}.safetensors"
    digests: dict[str, str] = {}

    def prepare() -> None:
        if workers.first:
            for old in place.parent.glob(".step-*.partial"):  # left by a killed run
                shutil.rmtree(old)
            place.parent.mkdir(exist_ok=True)  # the run's folder itself is there, or gone for a reason
            partial.mkdir()

    def publish() -> None:
        if workers.first:
            content = {"run": state.to_json(), "files": digests}
            with open(partial / STATE, "w") as file:
                json.dump(content | {"sha256": digest_of_values(content)}, file)
                file.flush()
                os.fsync(file.fileno())
            _sync(partial)
            if place.exists():
                shutil.rmtree(place)
            os.replace(partial, place)
            _sync(place.parent)

    def write_shards() -> None:
        if digest := write(partial / mine, tensors):
            digests[mine] = digest

    for work in (prepare, write_shards, publish):
        failure = None
        try:
            work()
        except (OSError, RuntimeError) as error:
            failure = error
        if workers.sum([failure is not None])[0]:  # all stop together
            if workers.first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(failure, "strerror", None) or failure or "another process failed"
            raise UserError(f"can't write the checkpoint {place}: {reason}") from failure
        digests = dict(sorted(workers.union(set(digests.items()))))
    if workers.first:
        prune(run, keep, best)
    return place


def prune(run: str | Path, keep: int, best: Path | None = None) -> None:
    """Remove all checkpoints but the last ``keep`` and ``best``; the first process alone does."""
    for old in complete(run)[:-keep]:
        if best is None or old.name != best.name:
            gone = old.with_name(f".{old.name}.partial")  # so that no half-removed one bears the name
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)


def read_state(path: str | Path) -> tuple[RunState, dict[str, str]]:
    """The plain values of a checkpoint, and the checksums of its files.

    Raises:
        Damaged: it has none, or they were changed.
    """
    place = Path(path) / STATE
    try:
        with open(regular(place), "rb") as file:
            text = file.read(MAX_STATE)
        content = json.loads(text)
        digest, files = content.pop("sha256"), content["files"]
        if digest != digest_of_values(content):
            raise ValueError("its checksum is another")
        if not files or not all(FILE.fullmatch(name) and isinstance(value, str) for name, value in files.items()):
            raise ValueError("it names other files than a checkpoint's")
        return RunState.from_json(content["run"]), files
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise Damaged(f"{path} is no complete checkpoint ({STATE}: {reason})") from error


def check(path: str | Path, workers: Workers) -> RunState:
    """The plain values of a checkpoint whose files are all as they were written; all processes take part.

    Raises:
        Damaged: on all of them, if they are not.
    """
    failure = state = None
    try:
        state, files = read_state(path)
        for name in list(files)[workers.rank :: workers.world]:
            if digest_of(regular(Path(path) / name)) != files[name]:
                raise Damaged(f"{path} is damaged: the checksum of {name} is another")
        Shards(Path(path), list(files))
    except Damaged as error:
        failure = str(error)
    except OSError as error:
        failure = f"{path} is damaged: {error}"
    failures = workers.union(set() if failure is None else {failure})
    if failures:
        raise Damaged(min(failures))
    return state


def load(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Read the tensors of a checkpoint in place, whatever number of processes wrote them.

    Raises:
        UserError: it lacks some, has them in other shapes, or is damaged.
    """
    held = Shards(Path(path), list(read_state(path)[1]))
    for name, tensor in tensors.items():
        if name not in held.shapes:
            raise UserError(f"the checkpoint {path} has no {name}; it is of another configuration")
        theirs, ours = ((tuple(x[0]), x[1]) for x in ((held.shapes[name], held.dtypes[name]),
                                                      (tensor.shape, tensor.dtype)))  # fmt: skip
        if theirs != ours:
            raise UserError(
                f"the checkpoint {path} is of another model: {name} is {theirs[0]} of {theirs[1]} there, "
                f"{ours[0]} of {ours[1]} here"
            )
    for name, tensor in tensors.items():
        held.fill(name, tensor)


class TrainedTensors:
    """The trained weights of a checkpoint, for `l2p_fast.convert merge`: the part of `Checkpoint`'s face it uses.

    Raises:
        UserError: the checkpoint is damaged, or has no averaged weights.
    """

    config: dict[str, Any] = {}

    def __init__(self, path: str | Path, average: bool = False):
        self.path = Path(path)
        state = check(path, Workers(0, 1, torch.device("cpu")))
        self._held = Shards(self.path, list(read_state(path)[1]))
        self._prefix = EMA if average else MODEL
        lora = state.config.get("lora") or {}
        rank, alpha = lora.get("rank") or 1, lora.get("alpha") or 0
        if not all(type(n) in (int, float) and abs(n) < 2**24 for n in (rank, alpha)):
            raise Damaged(f"{path} is damaged: its lora settings are not numbers")
        self.lora_scale = (alpha or rank) / rank  # of its pairs
        names = [name for name in self._held.shapes if name.startswith(self._prefix)]
        if not names:
            raise UserError(f"{path} holds no average of the weights; it was trained without ema.decay")
        if any(self._held.dtypes[name] not in DTYPES.values() for name in names):
            raise Damaged(f"{path} is damaged: its weights are not of a training's dtypes")
        self.shapes = {name.removeprefix(self._prefix): self._held.shapes[name] for name in names}
        self.tensors = {key: Stored(self.path / STATE, key, "", shape, 0) for key, shape in self.shapes.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its weights' dtypes."""
        return max((self._held.dtypes[self._prefix + key] for key in self.shapes), key=lambda dtype: dtype.itemsize)

    def piece(self, key: str, dtype: torch.dtype | None = None) -> Piece:
        """Raises UserError for values that aren't finite."""
        name = self._prefix + key

        def chunks(kind: torch.dtype) -> Iterator[Tensor]:
            for chunk in self._held.chunks(name):
                if not is_finite(chunk):
                    raise UserError(f"{self.path}: {key} holds values that are not finite; take an earlier checkpoint")
                yield chunk.to(kind)

        return Piece(self.shapes[key], dtype or self._held.dtypes[name], chunks)


def is_training_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint's folder (a run's folder is none)."""
    return (Path(path) / STATE).is_file()


def digest_of_values(content: Mapping[str, Any]) -> str:
    """Of plain values, in whatever order their keys stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
