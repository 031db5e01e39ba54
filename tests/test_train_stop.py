"""A training that is stopped, killed or can't write goes on, or says what is wrong; what was saved stays."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_training import CONTEXT, child, curve, make_world, start, tiny_model, world_in

from l2p_fast.errors import UserError
from l2p_fast.training import loop, monitor, shards
from l2p_fast.training import state as checkpoints
from l2p_fast.training.config import load_config
from l2p_fast.training.monitor import read_log
from l2p_fast.training.parallel import Workers
from l2p_fast.training.run import RunFolder

torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path):
    return world_in(tmp_path)


def test_resuming_is_as_if_it_had_not_stopped(world):
    run, folder = world
    settings = ["ema.decay=0.9", "objective.noise=fresh", "optim.warmup=3"]
    run(*settings, "steps=7")
    run(*settings, "steps=3", "save_every=10", f"run={folder / 'other'}")
    run(*settings, "steps=7", f"run={folder / 'other'}")
    assert curve(folder / "run") == curve(folder / "other")
    for name in ("trained", "trained-ema"):
        assert (folder / f"run/{name}.safetensors").read_bytes() == (folder / f"other/{name}.safetensors").read_bytes()


def test_only_the_last_checkpoints_are_kept(world):
    run, folder = world
    run("steps=7", "keep=2")
    assert [path.name for path in checkpoints.complete(folder / "run")] == ["step-00000006", "step-00000007"]
    assert len(list((folder / "run/checkpoints").iterdir())) == 2
    for resume in ("none", folder / "run/checkpoints/step-00000006"):
        with pytest.raises(UserError, match="holds a later checkpoint"):
            run("steps=8", f"--resume={resume}")


def test_a_run_can_start_from_anothers_checkpoint(world):
    run, folder = world
    run("steps=6")
    run("steps=6", f"run={folder / 'other'}", f"--resume={folder / 'run/checkpoints/step-00000004'}")
    assert curve(folder / "run")[4:] == curve(folder / "other")


def killed_and_resumed(folder: Path, whole: Path, kills: int, overrides: list[str]) -> None:
    """Kill a run ``kills`` times at random moments, writes included; its end must be that of ``whole``."""
    rng = random.Random(0)
    argv, log = [folder / "config.yaml", f"run={folder / 'killed'}", *overrides], folder / "log"
    longest = sum(line["seconds"] for line in read_log(whole)) / (kills + 1)
    for number in range(kills):
        process, began = start(argv, log), time.monotonic()
        while log.read_text().count("killed, step") <= number:  # it has come to its loop
            assert process.exitcode is None and time.monotonic() - began < 600, log.read_text()
            time.sleep(0.002)
        process.join(rng.uniform(0, longest))
        assert process.exitcode is None, f"the run ended before kill {number + 1}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = start(argv, log)
    process.join(600)
    assert process.exitcode == 0, log.read_text()
    assert curve(folder / "killed") == curve(whole)
    ours, theirs = (load_file(run / "trained.safetensors") for run in (folder / "killed", whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def uninterrupted(folder: Path, overrides: list[str]) -> Path:
    process = start([folder / "config.yaml", *overrides], folder / "log")
    process.join(600)
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run"


def test_killed_at_random_moments(tmp_path):
    make_world(tmp_path)
    overrides = ["steps=16", "save_every=1", "ema.decay=0.9"]
    killed_and_resumed(tmp_path, uninterrupted(tmp_path, overrides), 3, overrides)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    make_world(tmp_path)
    overrides = ["steps=100", "save_every=1", "ema.decay=0.9", "optim.kind=adamw8bit"]
    killed_and_resumed(tmp_path, uninterrupted(tmp_path, overrides), 30, overrides)


@pytest.mark.parametrize("drawing", [False, True])
def test_sigterm_saves_and_ends_well(tmp_path, drawing):
    make_world(tmp_path)
    argv = [tmp_path / "config.yaml", "steps=100000", "save_every=100000"]
    if drawing:  # an endless sample sheet
        argv += ["log.sample_every=3", "log.prompts=[picture 1]", "log.sample_steps=10000", "log.height=32",
                 "log.width=32"]  # fmt: skip
    process = start(argv, tmp_path / "log")
    began = time.monotonic()
    while len(read_log(tmp_path / "run")) < 3:
        assert process.exitcode is None and time.monotonic() - began < 100, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    [place] = checkpoints.complete(tmp_path / "run")
    assert checkpoints.read_state(place)[0].step == len(read_log(tmp_path / "run"))
    assert "stopped by a signal" in (tmp_path / "log").read_text()
    assert not drawing or len(read_log(tmp_path / "run")) == 3


def limited(argv, log, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    child(argv, log, {})


def test_a_full_disk(world):
    """No file may grow past a limit, which is how a full disk looks to a process."""
    run, folder = world
    run("steps=2")
    size = max(path.stat().st_size for path in (folder / "run/checkpoints").rglob("*"))
    process = CONTEXT.Process(
        target=limited,
        args=([str(folder / "config.yaml"), "steps=4", "log.board=none"], str(folder / "log"), size // 2),
    )
    process.start()
    process.join(100)
    said = (folder / "log").read_text()
    assert process.exitcode == 2 and said.count("error:") == 1 and "Traceback" not in said, said
    assert "can't write the checkpoint" in said and "step-00000002 is kept; make room and start again" in said
    [place] = checkpoints.complete(folder / "run")
    assert place.name == "step-00000002" and list(place.parent.iterdir()) == [place]
    assert run("steps=4") == 0


def test_no_space_left_for_a_checkpoint(world, monkeypatch):
    run, folder = world
    run("steps=2")
    full = lambda path, mode: open("/dev/full" if mode == "wb" else path, mode)  # noqa: E731
    monkeypatch.setattr(shards, "open", full, raising=False)
    with pytest.raises(UserError, match="checkpoint .*step-00000004: No space left on device; .*00000002 is kept"):
        run("steps=4")
    monkeypatch.undo()
    assert run("steps=4") == 0


def test_a_full_disk_under_the_log(world, monkeypatch):
    run, folder = world
    run("steps=2")
    monkeypatch.setattr(monitor, "open", lambda *_: open("/dev/full", "w"), raising=False)
    with pytest.raises(UserError, match="/dev/full: No space left on device; .*step-00000002 is kept"):
        run("steps=4")
    monkeypatch.undo()
    assert run("steps=4") == 0 and len(curve(folder / "run")) == 4


def test_an_unwritable_folder(world):
    run, folder = world
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="can't write .*file"):
        run(f"run={folder / 'file' / 'run'}")


def test_a_loss_that_is_not_finite(world, monkeypatch):
    run, folder = world
    run("steps=2", "save_every=2")
    real, calls = loop.losses, []

    def sometimes(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) in (1, 3, 4) else 1.0)

    monkeypatch.setattr(loop, "losses", sometimes)
    with pytest.raises(UserError, match="step 6: .* not finite 2 steps in a row"):
        run("steps=20", "save_every=2", "optim.max_skipped=2")
    steps = [path.name for path in checkpoints.complete(folder / "run")]
    assert steps == ["step-00000002", "step-00000004"]
    state, _ = checkpoints.read_state(checkpoints.complete(folder / "run")[-1])
    assert (state.step, state.updates, state.skipped, state.skipped_in_row) == (4, 3, 1, 0)


def broken(model, *_):
    return model.local_decoder.out_conv.bias[:2] * float("inf")


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_is_not_saved(world, monkeypatch, fused):
    """Whatever comes after step 4: its checkpoint stays the last, and no good one makes room."""
    run, folder = world
    run("steps=4", "save_every=2", f"optim.fused={fused}")
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "run/checkpoints").rglob("*"))
    monkeypatch.setattr(loop, "losses", broken)
    with pytest.raises(UserError, match="not finite 7 steps in a row; the last good checkpoint is .*step-00000004;"):
        run("steps=50", "save_every=2", "optim.max_skipped=7", f"optim.fused={fused}")
    assert run("steps=9", "save_every=2", "optim.max_skipped=7", f"optim.fused={fused}") == 0
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (folder / "run/checkpoints").rglob("*"))
    monkeypatch.undo()
    assert run("steps=9", f"optim.fused={fused}") == 0
    assert [step for step, *_ in curve(folder / "run")] == list(range(1, 10))


def test_a_gradient_that_is_not_finite_changes_nothing(world, monkeypatch):
    run, folder = world
    real, calls = loop.losses, []
    monkeypatch.setattr(loop, "losses", lambda *a: (broken if calls.append(1) or len(calls) < 3 else real)(*a) * 1e-30)
    run("steps=3", "optim.weight_decay=0", "optim.eps=1")  # the third step's update is too small to be one
    held = checkpoints.TrainedTensors(checkpoints.complete(folder / "run")[-1])
    before = tiny_model().state_dict()
    for key in held.shapes:
        assert torch.equal(next(held.piece(key).chunks(torch.float32)), before[key])


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(world, monkeypatch):
    run, folder = world
    run("steps=2")
    step = loop.AdamW.step

    def overflow(optimizer):
        step(optimizer)
        next(iter(optimizer.named.values())).data.fill_(float("inf"))

    monkeypatch.setattr(loop.AdamW, "step", overflow)
    with pytest.raises(UserError, match=r"step 3: model\..* is not finite; the last good checkpoint is .*00000002"):
        run("steps=4", "save_every=1")
    assert [p.name for p in checkpoints.complete(folder / "run")] == ["step-00000002"]
    assert all(torch.isfinite(t).all() for t in load_file(folder / "run/trained.safetensors").values())


def test_no_finite_step_at_all(world, monkeypatch):
    run, folder = world
    monkeypatch.setattr(loop, "losses", broken)
    with pytest.raises(UserError, match="no step had a finite loss and gradient: nothing is saved"):
        run("steps=4")
    assert not (folder / "run/trained.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("freeze.n=0", "made with freeze = "),
        ("ema.decay=0.5", "made with ema.decay = 0.0, now it is 0.5"),
        ("seed=4", "made with seed"),
        ("optim.rounding=masters", "made with optim.rounding"),
    ],
)
def test_a_checkpoint_of_another_configuration(world, override, says):
    run, folder = world
    run("steps=2")
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "run/checkpoints").rglob("*"))
    with pytest.raises(UserError, match=says):
        run("steps=4", override)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (folder / "run/checkpoints").rglob("*"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(world, capsys):
    run, folder = world
    run("steps=6")
    whole = curve(folder / "run")
    last = checkpoints.complete(folder / "run")[-1]
    shard = last / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="step-00000006 is damaged: the checksum of rank-00000.safetensors is another"):
        run("steps=6", f"--resume={last}")
    assert run("steps=6") == 0
    said = capsys.readouterr().out
    assert "step-00000006 is damaged" in said and "step-00000004 is used" in said
    assert curve(folder / "run") == whole and checkpoints.complete(folder / "run")[-1] == last
    assert (folder / "run/checkpoints/step-00000006.damaged-1").is_dir()


def test_no_checkpoint_is_whole(world):
    run, folder = world
    run("steps=2")
    [place] = checkpoints.complete(folder / "run")
    (place / checkpoints.STATE).write_text("{}")
    with pytest.raises(UserError, match="no 'sha256'.*; no other checkpoint of .* is whole"):
        run("steps=4")
    assert checkpoints.complete(folder / "run") == [place]
    with pytest.raises(UserError, match="no complete checkpoint"):
        run("steps=4", f"--resume={folder}")


def test_other_names_are_no_checkpoints(world):
    run, folder = world
    run("steps=2")
    [place] = checkpoints.complete(folder / "run")
    for name in ("step-99999999x", "step-1", "step-00000009.bak", "step-best", "my-step-00000009"):
        shutil.copytree(place, place.with_name(name))
    (place.parent / "step-00000008").mkdir()
    assert checkpoints.complete(folder / "run") == [place]
    assert run("steps=6", "keep=1") == 0
    assert len(list(place.parent.iterdir())) == 7


def test_one_run_at_a_time(world):
    run, folder = world
    with RunFolder(str(folder / "run"), Workers(0, 1, torch.device("cpu"))):
        with pytest.raises(UserError, match=f"another run .process {os.getpid()} on .* is in .*/run; wait for its end"):
            run("steps=2")
    assert run("steps=2") == 0  # the lock file itself holds nobody up


def test_a_folder_that_vanishes(world, monkeypatch):
    run, folder = world
    real = loop.losses

    def moving(*args):
        if (folder / "run").exists():
            (folder / "run").rename(folder / "away")
        return real(*args)

    monkeypatch.setattr(loop, "losses", moving)
    with pytest.raises(UserError, match="run's folder .*/run was removed or moved"):
        run("steps=4")
    assert not (folder / "run").exists()


def test_a_damaged_line_is_lost_alone(world):
    run, folder = world
    run("steps=5")
    log = folder / "run/log.jsonl"
    lines = log.read_bytes().splitlines()
    lines[1], lines[2], lines[3] = b"\xff{", b"[" * 100_000, lines[3].replace(b'"step"', b'"leap"')
    log.write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_log(folder / "run")] == [1, 5]
    run("steps=6")
    assert [line["step"] for line in read_log(folder / "run")] == [1, 5, 6]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.base=", "no model to start from"),
        ("model.base=nowhere.safetensors", "nowhere.safetensors"),
        ("data.path=", "no training data"),
        ("data.features=none", "give data.text_encoder"),
        ("run=", "no folder for the run"),
        ("device=quantum", "no device 'quantum'"),
        ("device=cuda:99", "no CUDA device"),
    ],
)
def test_what_is_missing(world, override, says, monkeypatch):
    run, folder = world
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=says):
        run(override)


def test_several_processes_need_fsdp(world, monkeypatch):
    run, _ = world
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="add --fsdp"):
        run()


def test_signals_are_as_before_after_a_run(world):
    run, _ = world
    before = signal.getsignal(signal.SIGTERM)
    run("steps=2")
    assert signal.getsignal(signal.SIGTERM) is before


def test_state_is_plain_json(world):
    run, folder = world
    run("steps=2")
    [place] = checkpoints.complete(folder / "run")
    state = json.loads((place / checkpoints.STATE).read_text())
    assert state["run"]["data"]["step"] == 2
    assert load_config(folder / "run" / "config.yaml").steps == 2
