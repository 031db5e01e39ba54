"""A whole training, tiny: what is frozen stays, what stops goes on, what breaks says so."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_training import CONTEXT, PICTURES, child, curve, make_world, start, tiny_model

from l2p_fast import convert, plot
from l2p_fast.checkpoint import Checkpoint, load_model
from l2p_fast.errors import UserError
from l2p_fast.train import main
from l2p_fast.training import checkpoint as checkpoints
from l2p_fast.training.config import load_config
from l2p_fast.training.monitor import read_log

torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path):
    """(run the command line with overrides, the world's folder)."""
    path = make_world(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda *overrides: main([str(path), *map(str, overrides)]), tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def frozen_and_trained(model, trained):
    state = model.state_dict()
    return [k for k in state if k not in trained], [k for k in state if k in trained]


@pytest.mark.parametrize("policy", ["paper", "published", "full"])
def test_frozen_blocks_stay_bit_for_bit(world, policy):
    run, folder = world
    assert run(f"freeze.policy={policy}", "steps=2") == 0
    trained = load_file(folder / "run" / "trained.safetensors")
    before = tiny_model().state_dict()
    assert set(trained) < set(before) if policy != "full" else set(trained) == set(before)
    assert any(key.startswith("layers.1.") for key in trained) == (policy == "full")
    out = folder / "merged.safetensors"
    convert.main(["merge", str(folder / "run/trained.safetensors"), "--base", str(folder / "base.safetensors"),
                  "--out", str(out)])  # fmt: skip
    after = load_model(out).state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value) == (key not in trained), key


def test_it_learns(world):
    run, folder = world
    run("steps=60", "objective.grid=1", "optim.lr=1e-2", "ema.decay=0.9", "save_every=100")  # from pure noise
    losses = [loss for _, loss, _ in curve(folder / "run")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    lines = read_log(folder / "run")
    assert lines[-1]["epoch"] == 60 * 2 / PICTURES and lines[0]["images"] == 2
    assert all(0 <= float(k.split("-")[0]) < 1 for line in lines for k in line["loss_by_sigma"])
    averaged = load_file(folder / "run" / "trained-ema.safetensors")
    trained = load_file(folder / "run" / "trained.safetensors")
    assert averaged.keys() == trained.keys() and any(not torch.equal(averaged[k], trained[k]) for k in trained)


def test_a_checkpoint_merges_like_the_trained_tensors(world):
    run, folder = world
    run("steps=2", "ema.decay=0.5")
    [place] = checkpoints.complete(folder / "run")
    base = str(folder / "base.safetensors")
    for name, flags in (("trained", []), ("trained-ema", ["--ema"])):
        outs = [folder / f"{name}-{i}.safetensors" for i in (0, 1)]
        convert.main(["merge", str(folder / "run" / f"{name}.safetensors"), "--base", base, "--out", str(outs[0])])
        convert.main(["merge", str(place), "--base", base, *flags, "--out", str(outs[1])])
        assert outs[0].read_bytes() == outs[1].read_bytes()
        Checkpoint(outs[1]).demand("l2p")


@pytest.mark.parametrize(
    "setting",
    [
        ["accumulation=2"],
        ["memory.checkpointing=false", "memory.head_mb=1"],
        ["memory.offload_checkpoints=true"],
        ["optim.fused=true"],
        ["optim.offload=true"],
    ],
    ids=" ".join,
)
def test_ways_to_save_memory_change_nothing(world, setting):
    run, folder = world
    run("steps=3")
    run("steps=3", f"run={folder / 'other'}", *setting)
    for ours, theirs in zip(curve(folder / "run"), curve(folder / "other"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_blocks_in_few_bits_pass_gradients_on(world, bits):
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    run, folder = world
    run("steps=3")
    run("steps=3", f"run={folder / 'other'}", f"model.frozen_bits={bits}")
    trained = load_file(folder / "other" / "trained.safetensors")
    start = tiny_model().state_dict()
    assert all(not torch.equal(trained[key], start[key]) for key in trained if key.startswith("all_x_embedder"))
    for (_, ours, norm), (_, theirs, other) in zip(curve(folder / "run"), curve(folder / "other"), strict=True):
        assert theirs == pytest.approx(ours, rel=0.02) and other == pytest.approx(norm, rel=0.1)


def test_bf16_and_8_bits(world):
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    run, folder = world
    run("model.weights=bfloat16", "model.compute=bfloat16", "optim.kind=adamw8bit", "optim.fused=true", "steps=4")
    assert all(value.dtype == torch.bfloat16 for value in load_file(folder / "run/trained.safetensors").values())
    assert len(curve(folder / "run")) == 4


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


def killed_and_resumed(folder: Path, whole: Path, kills: int, overrides: list[str], longest: float) -> None:
    """Kill a run at random moments until it has been killed ``kills`` times; its end must be that of ``whole``."""
    rng = random.Random(0)
    argv = [folder / "config.yaml", f"run={folder / 'killed'}", *overrides]
    done = 0
    while done < kills:
        process = start(argv, folder / "log")
        process.join(rng.uniform(0.05, longest))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
        else:
            assert process.exitcode == 0, (folder / "log").read_text()
            break
    process = start(argv, folder / "log")
    process.join(600)
    assert process.exitcode == 0, (folder / "log").read_text()
    assert done, "the run ended before it could be killed"
    assert curve(folder / "killed") == curve(whole)
    ours, theirs = (load_file(run / "trained.safetensors") for run in (folder / "killed", whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def uninterrupted(folder: Path, overrides: list[str]) -> tuple[Path, float]:
    """(the run's folder, seconds it took)."""
    began = time.monotonic()
    process = start([folder / "config.yaml", *overrides], folder / "log")
    process.join(600)
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run", time.monotonic() - began


def test_killed_at_random_moments(tmp_path):
    make_world(tmp_path)
    overrides = ["steps=40", "save_every=1", "ema.decay=0.9"]
    whole, seconds = uninterrupted(tmp_path, overrides)
    killed_and_resumed(tmp_path, whole, 3, overrides, 0.6 * seconds)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    make_world(tmp_path)
    overrides = ["steps=250", "save_every=1", "ema.decay=0.9", "optim.kind=adamw8bit"]
    whole, seconds = uninterrupted(tmp_path, overrides)
    killed_and_resumed(tmp_path, whole, 20, overrides, seconds / 12)


def test_sigterm_saves_and_ends_well(tmp_path):
    make_world(tmp_path)
    argv = [tmp_path / "config.yaml", "steps=100000", "save_every=100000"]
    process = start(argv, tmp_path / "log")
    began = time.monotonic()
    while len(read_log(tmp_path / "run")) < 3:
        assert process.exitcode is None and time.monotonic() - began < 100, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    [place] = checkpoints.complete(tmp_path / "run")
    assert checkpoints.read_state(place)["step"] == len(read_log(tmp_path / "run"))
    assert "stopped by a signal" in (tmp_path / "log").read_text()


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
    assert "can't write the checkpoint" in said and "earlier checkpoints are whole" in said
    [place] = checkpoints.complete(folder / "run")
    assert place.name == "step-00000002" and list(place.parent.iterdir()) == [place]
    assert run("steps=4") == 0


def test_an_unwritable_folder(world):
    run, folder = world
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="can't write .*file"):
        run(f"run={folder / 'file' / 'run'}")


def test_a_loss_that_is_not_finite(world, monkeypatch):
    from l2p_fast import train

    run, folder = world
    run("steps=2", "save_every=2")
    real, calls = train.losses, []

    def sometimes(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) in (1, 3, 4) else 1.0)

    monkeypatch.setattr(train, "losses", sometimes)
    with pytest.raises(UserError, match="step 6: .* not finite 2 steps in a row"):
        run("steps=20", "save_every=2", "optim.max_skipped=2")
    steps = [path.name for path in checkpoints.complete(folder / "run")]
    assert steps == ["step-00000002", "step-00000004"]
    state = checkpoints.read_state(checkpoints.complete(folder / "run")[-1])
    assert (state["step"], state["updates"], state["skipped"], state["skipped_in_row"]) == (4, 3, 1, 0)


def test_a_gradient_that_is_not_finite_changes_nothing(world, monkeypatch):
    from l2p_fast import train

    run, folder = world
    monkeypatch.setattr(train, "losses", lambda model, *a: model.local_decoder.out_conv.bias[:2] * float("inf"))
    with pytest.raises(UserError, match="not finite 10 steps in a row"):
        run("steps=50")
    held = checkpoints.TrainedTensors(checkpoints.complete(folder / "run")[-1])
    before = tiny_model().state_dict()
    for key in held.shapes:
        assert torch.equal(next(held.piece(key).chunks(torch.float32)), before[key])


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


def test_a_damaged_checkpoint(world):
    run, folder = world
    run("steps=2")
    [place] = checkpoints.complete(folder / "run")
    (place / ".metadata").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        run("steps=4")
    with pytest.raises(UserError, match="no complete checkpoint"):
        run("steps=4", f"--resume={folder}")


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


def test_sample_sheets_and_plots(world):
    from PIL import Image

    run, folder = world
    run("steps=2", "log.sample_every=2", "log.prompts=[picture 1, picture 2]", "log.sample_steps=2", "log.height=32",
        "log.width=48")  # fmt: skip
    assert Image.open(folder / "run/samples/step-00000002.png").size == (96, 32)
    pytest.importorskip("matplotlib", reason="pip install l2p_fast[train]")
    assert plot.main([str(folder / "run")]) == 0
    assert Image.open(folder / "run" / "curves.png").size[0] > 400
    with pytest.raises(UserError, match="no log.jsonl"):
        plot.main([str(folder)])


def test_dry_run_of_a_run_to_be(world, capsys):
    run, folder = world
    assert run("--dry-run") == 0
    text = capsys.readouterr().out
    count = sum(p.numel() for p in tiny_model().parameters())
    assert f"{count / 1e3:.1f} k parameters" in text and "all_x_embedder" in text and "fits" in text
    assert not (folder / "run").exists()


def test_the_command_line_shows_one_line(tmp_path):
    command = [sys.executable, "-m", "l2p_fast.train", "optim.kid=x"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.strip() == "error: unknown setting optim.kid; did you mean kind?"


def test_state_is_plain_json(world):
    run, folder = world
    run("steps=2")
    [place] = checkpoints.complete(folder / "run")
    state = json.loads((place / checkpoints.STATE).read_text())
    assert state["data"]["step"] == 2
    assert load_config(folder / "run" / "config.yaml").steps == 2
