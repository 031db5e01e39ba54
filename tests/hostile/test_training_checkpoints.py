"""Checkpoints of trainings that are damaged, or made by a stranger: none runs code, none is taken for whole."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_training import world_in

from l2p_fast import convert
from l2p_fast.errors import UserError
from l2p_fast.training import state as checkpoints
from l2p_fast.training.parallel import Workers
from l2p_fast.training.run import RunFolder
from l2p_fast.training.shards import Damaged, Shards
from l2p_fast.training.state import RunState

ALONE = Workers(0, 1, torch.device("cpu"))
FILE = "rank-00000.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "model.a.weight": torch.randn(6, 4, generator=rng), "model.a.bias": torch.randn(6, generator=rng),
        "optim.a.weight.m": torch.randint(0, 256, (6, 256), generator=rng).byte(),
        "ema.a.weight": torch.randn(6, 4, generator=rng).bfloat16().float(),
    }  # fmt: skip


def make(run: Path, step: int = 5) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    state = RunState(step=step, data={"step": step, "cursors": [1], "bad": []}, config={"seed": 0})
    state.take_rng()
    return checkpoints.save(run, tensors(), state, 99, ALONE)


def seal(place: Path, change) -> None:
    """Change the plain values, and make their checksum fit again: what a stranger would do."""
    content = json.loads((place / checkpoints.STATE).read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = checkpoints.digest_of_values(content)
    (place / checkpoints.STATE).write_text(json.dumps(content))


def rewrite(place: Path, change) -> None:
    """Change a header of the tensors' file, its checksum too."""
    content = (place / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    rows = json.loads(header["__metadata__"]["rows"])
    change(header, rows)
    if "rows" in header.get("__metadata__", {}):
        header["__metadata__"]["rows"] = json.dumps(rows) if not isinstance(rows, str) else rows
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (place / FILE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    seal(place, lambda c: c["files"].update({FILE: checkpoints.digest_of(place / FILE)}))


def patch(place: Path, name: str, change) -> None:
    content = bytearray((place / name).read_bytes())
    (place / name).write_bytes(change(content) or content)


def flip(at: float):
    def change(content: bytearray) -> None:
        content[int(at * (len(content) - 1))] ^= 0x10

    return change


def put(table, *path, value):
    def change(*parts) -> None:
        *parents, last = path
        target = parts[table]
        for part in parents:
            target = target[part]
        target[last] = value

    return change


def remove(place: Path) -> None:
    place.unlink() if not place.is_dir() else shutil.rmtree(place)


def fifo(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


STATE = checkpoints.STATE
PLACES = (0, 0.001, 0.1, 0.3, 0.5, 0.8, 1)
DAMAGES = {
    **{f"tensors, a bit at {at}": lambda p, at=at: patch(p, FILE, flip(at)) for at in PLACES},
    **{f"state, a bit at {at}": lambda p, at=at: patch(p, STATE, flip(at)) for at in PLACES},
    "tensors cut": lambda p: patch(p, FILE, lambda c: c[: len(c) // 2]),
    "tensors cut by a byte": lambda p: patch(p, FILE, lambda c: c[:-1]),
    "tensors longer": lambda p: patch(p, FILE, lambda c: c + b"x"),
    "tensors empty": lambda p: (p / FILE).write_bytes(b""),
    "tensors gone": lambda p: remove(p / FILE),
    "tensors a folder": lambda p: (remove(p / FILE), (p / FILE).mkdir()),
    "tensors a pipe": lambda p: fifo(p / FILE),
    "tensors of another": lambda p: (p / FILE).write_bytes(struct.pack("<Q", 2) + b"{}"),
    "state cut": lambda p: patch(p, STATE, lambda c: c[: len(c) // 2]),
    "state empty": lambda p: (p / STATE).write_bytes(b""),
    "state deep": lambda p: (p / STATE).write_bytes(b"[" * 100_000),
    "state a list": lambda p: (p / STATE).write_bytes(b"[]"),
    "state a number": lambda p: (p / STATE).write_bytes(b"1" * 5000),
    "state no text": lambda p: (p / STATE).write_bytes(b"\xff\xfe\x00"),
    "no checksum": lambda p: (p / STATE).write_bytes(b'{"run": {}, "files": {}}'),
    "no files": lambda p: seal(p, put(0, "files", value={})),
    "files a list": lambda p: seal(p, put(0, "files", value=[FILE])),
    "a file elsewhere": lambda p: seal(p, put(0, "files", value={"../../" + FILE: "0" * 64})),
    "an absolute file": lambda p: seal(p, put(0, "files", value={"/etc/passwd": "0" * 64})),
    "a file of another name": lambda p: seal(p, put(0, "files", value={FILE + "\n": "0" * 64})),
    "another file too": lambda p: seal(p, put(0, "files", "rank-00001.safetensors", value="0" * 64)),
    "a checksum of null": lambda p: seal(p, put(0, "files", FILE, value=None)),
    "run a list": lambda p: seal(p, put(0, "run", value=[])),
    "a value too many": lambda p: seal(p, put(0, "run", "extra", value=1)),
    "step a text": lambda p: seal(p, put(0, "run", "step", value="5")),
    "step below zero": lambda p: seal(p, put(0, "run", "step", value=-5)),
    "step a truth": lambda p: seal(p, put(0, "run", "step", value=True)),
    "step beyond": lambda p: seal(p, put(0, "run", "step", value=10**30)),
    "seconds without end": lambda p: seal(p, put(0, "run", "seconds", value=float("inf"))),
    "seconds no number": lambda p: seal(p, put(0, "run", "seconds", value=float("nan"))),
    "random state short": lambda p: seal(p, put(0, "run", "rng", value="00")),
    "random state no digits": lambda p: seal(p, put(0, "run", "rng", value="xy" * 5056)),
    "data empty": lambda p: seal(p, put(0, "run", "data", value={})),
    "cursors of text": lambda p: seal(p, put(0, "run", "data", "cursors", value=["a"])),
    "cursors below zero": lambda p: seal(p, put(0, "run", "data", "cursors", value=[-1])),
    "cursors beyond": lambda p: seal(p, put(0, "run", "data", "cursors", value=[10**4000])),
    "bad names of numbers": lambda p: seal(p, put(0, "run", "data", "bad", value=[1])),
    "config a text": lambda p: seal(p, put(0, "run", "config", value="x")),
    "no metadata": lambda p: rewrite(p, lambda h, r: h.pop("__metadata__")),
    "no rows": lambda p: rewrite(p, lambda h, r: h["__metadata__"].pop("rows")),
    "rows missing": lambda p: rewrite(p, lambda h, r: r.pop("model.a.weight")),
    "rows from 1": lambda p: rewrite(p, put(1, "model.a.weight", value=[1, 6])),
    "rows below zero": lambda p: rewrite(p, put(1, "model.a.weight", value=[-3, 6])),
    "more rows": lambda p: rewrite(p, put(1, "model.a.weight", value=[0, 10**18])),
    "rows of text": lambda p: rewrite(p, put(1, "model.a.weight", value=["a", "b"])),
    "rows a number": lambda p: rewrite(p, put(1, "model.a.weight", value=6)),
    "a shape too large": lambda p: rewrite(p, put(0, "model.a.weight", "shape", value=[2**40, 2**40])),
    "a shape below zero": lambda p: rewrite(p, put(0, "model.a.weight", "shape", value=[-6, -4])),
    "no dimension": lambda p: rewrite(p, put(0, "model.a.bias", "shape", value=[])),
    "a dtype unknown": lambda p: rewrite(p, put(0, "model.a.weight", "dtype", value="Q7")),
    "tensors overlap": lambda p: rewrite(p, put(0, "model.a.weight", "data_offsets", value=[0, 96])),
    "an offset beyond": lambda p: rewrite(p, put(0, "model.a.weight", "data_offsets", value=[10**12, 10**12 + 96])),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    make(tmp_path / "run", 4)
    return tmp_path / "run", make(tmp_path / "run", 5)


def test_a_whole_one_is_whole(pair):
    run, place = pair
    assert checkpoints.check(place, ALONE).step == 5
    held = {name: torch.zeros_like(value) for name, value in tensors().items()}
    checkpoints.load(place, held)
    assert all(torch.equal(held[name], value) for name, value in tensors().items())
    assert checkpoints.TrainedTensors(place).shapes == {"a.weight": (6, 4), "a.bias": (6,)}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages(pair, name):
    run, place = pair
    DAMAGES[name](place)
    held = {name: torch.zeros_like(value) for name, value in tensors().items()}
    with pytest.raises(Damaged):
        checkpoints.check(place, ALONE)
    with pytest.raises(UserError):
        checkpoints.TrainedTensors(place)
    with RunFolder(str(run), ALONE) as folder:
        found, state, notes = folder.find("auto")
    assert found.name == "step-00000004" and state.step == 4 and "step-00000004 is used" in notes[0]
    checkpoints.load(found, held)
    assert all(torch.equal(held[name], value) for name, value in tensors().items())
    assert len(" ".join(notes[0].split())) < 2000


@pytest.mark.parametrize(
    ("name", "value"), [("model.a.weight", torch.zeros(6, 5)), ("model.a.weight", torch.zeros(6, 4).bfloat16()),
                        ("model.b.weight", torch.zeros(6, 4))],
)  # fmt: skip
def test_another_model(pair, name, value):
    with pytest.raises(UserError, match="of another"):
        checkpoints.load(pair[1], tensors() | {name: value})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_merged(tmp_path, bad):
    (tmp_path / "checkpoints").mkdir()
    state = RunState(data={"step": 0, "cursors": [], "bad": []})
    state.take_rng()
    place = checkpoints.save(tmp_path, {"model.a": torch.tensor([1.0, bad])}, state, 1, ALONE)
    with pytest.raises(UserError, match="NaN or infinite|not finite"):
        list(checkpoints.TrainedTensors(place).piece("a").chunks(torch.float32))


def test_rows_of_several_processes_are_put_together(tmp_path):
    whole = torch.arange(20.0).view(5, 4)
    for rank, (first, count) in enumerate(((0, 3), (3, 2))):
        part = whole[first : first + count].contiguous()
        checkpoints.write(tmp_path / f"rank-{rank:05d}.safetensors", {"a": part})
        text = (tmp_path / f"rank-{rank:05d}.safetensors").read_bytes()
        old, new = (json.dumps(json.dumps({"a": rows}))[1:-1].encode() for rows in ([0, count], [first, 5]))
        (tmp_path / f"rank-{rank:05d}.safetensors").write_bytes(text.replace(old, new))
    held = Shards(tmp_path, ["rank-00001.safetensors", "rank-00000.safetensors"])
    assert torch.equal(torch.cat(list(held.chunks("a"))), whole)
    assert torch.equal(torch.cat(list(held.chunks("a", 2, 2))), whole[2:4])
    with pytest.raises(Damaged, match="don't fit together"):
        Shards(tmp_path, ["rank-00001.safetensors"])


# --- What would run code ---------------------------------------------------------------------------------------------
class Reduce:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return value.command if isinstance(value, Reduce) else None


def pickles(marker: Path) -> dict[str, bytes]:
    command = f"touch {marker}"
    found = {f"reduce {protocol}": pickle.dumps(Reduce(command), protocol) for protocol in range(6)}
    text = command.encode()
    for module, name in ((b"pathlib", b"os.system"), (b"torch", b"serialization.os.system"),
                         (b"torch.distributed.checkpoint.filesystem", b"os.system")):  # fmt: skip
        strings = b"".join(b"\x8c" + bytes([len(s)]) + s for s in (module, name))
        for protocol in (4, 5):
            found[f"dotted {module.decode()} {protocol}"] = (
                b"\x80" + bytes([protocol]) + strings + b"\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
            )
    found["global"] = b"cos\nsystem\n(S'" + text + b"'\ntR."
    found["inst"] = b"(S'" + text + b"'\nios\nsystem\n."
    for protocol in (0, 2, 5):
        out = io.BytesIO()
        Persistent(out, protocol).dump([Reduce(command)])
        found[f"persistent {protocol}"] = out.getvalue()
    out = io.BytesIO()
    torch.save(Reduce(command), out)
    found["torch.save"] = out.getvalue()
    return found


WATCHED: list[list[str]] = []  # while a list is in it, modules that a pickle asks for are noted there


def _watch(event: str, arguments: tuple) -> None:
    if WATCHED and event == "pickle.find_class":
        WATCHED[-1].append(".".join(map(str, arguments)))


@pytest.fixture
def unpickled():
    if not getattr(sys, "_l2p_watch", False):
        sys.addaudithook(_watch)
        sys._l2p_watch = True
    WATCHED.append([])
    yield WATCHED[-1]
    WATCHED.pop()


def test_the_pickles_would_run(tmp_path, unpickled):
    """The test's own instruments: each of these does run where a pickle is trusted."""
    for name, content in pickles(tmp_path / "ran").items():
        if not name.startswith(("persistent", "torch.save")):
            pickle.loads(content)
            assert (tmp_path / "ran").exists(), name
            (tmp_path / "ran").unlink()
    assert unpickled


@pytest.mark.parametrize("where", [".metadata", STATE, FILE, "rank-00001.safetensors", "__0_0.distcp"])
def test_no_pickle_is_read(pair, tmp_path, unpickled, where):
    run, place = pair
    for name, content in pickles(tmp_path / "ran").items():
        before = (place / where).read_bytes() if (place / where).exists() else None
        (place / where).write_bytes(content)
        for sealed in (False, True) if where == FILE else (False,):
            if sealed:
                seal(place, lambda c: c["files"].update({FILE: checkpoints.digest_of(place / FILE)}))
            for read in (lambda: checkpoints.check(place, ALONE), lambda: checkpoints.load(place, tensors()),
                         lambda: checkpoints.TrainedTensors(place)):  # fmt: skip
                try:
                    read()
                except UserError:
                    assert where in (STATE, FILE), name
                else:
                    assert where not in (STATE, FILE), name
        if before is not None:
            (place / where).write_bytes(before)
    assert not unpickled and not (tmp_path / "ran").exists()


def test_neither_resuming_nor_merging_runs_code(tmp_path, unpickled):
    run, folder = world_in(tmp_path)
    run("steps=2")
    [place] = checkpoints.complete(folder / "run")
    for number, content in enumerate(pickles(tmp_path / "ran").values()):
        for name in (".metadata", f"__{number}_0.distcp", f"rank-{number + 1:05d}.safetensors"):
            (place / name).write_bytes(content)
        (folder / "features" / f"{number}.pt").write_bytes(content)
    assert run("steps=3") == 0
    merge = ["merge", str(place), "--base", str(folder / "base.safetensors"), "--out", str(folder / "out.safetensors")]
    convert.main(merge)
    for content in pickles(tmp_path / "ran").values():
        (place / STATE).write_bytes(content)
        with pytest.raises(UserError):
            convert.main([*merge, "--overwrite"])
    with pytest.raises(UserError):
        run("steps=4", f"--resume={place}", f"run={folder / 'other'}")
    assert not (tmp_path / "ran").exists()
    assert not [name for name in unpickled if name.startswith(("os", "posix", "nt", "pathlib", "torch.serialization"))]
