"""A whole training, tiny: what is frozen stays, what saves memory changes nothing, what it writes can be used."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_training import IMAGES, curve, tiny_model, world_in

from l2p_fast import convert, plot
from l2p_fast.errors import UserError
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.loading import load_model
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.training import state as checkpoints
from l2p_fast.training.monitor import read_log
from l2p_fast.training.plots import plain_log_scale, smooth

torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path):
    return world_in(tmp_path)


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
    assert lines[-1]["epoch"] == 60 * 2 / IMAGES and lines[0]["images"] == 2
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
    assert [round(value, 3) for value in smooth([1.0, math.inf, 1.0])[::2]] == [1.0, 1.0]
    with pytest.raises(UserError, match="multiples of 16, got 40 x 48"):
        run("steps=4", "log.sample_every=4", "log.prompts=[picture 1]", "log.height=40", "log.width=48")


@pytest.mark.parametrize(
    ("values", "ticks"), [((0.08, 30), "0.1 0.2 0.5 1 2 5 10 20"), ((1.02, 1.18), "1.05 1.1 1.15"),
                          ((1000, 40000), "1000 2000 5000 10000 20000")],
)  # fmt: skip
def test_axes_have_plain_numbers(values, ticks):
    figure = pytest.importorskip("matplotlib.figure", reason="pip install l2p_fast[train]").Figure()
    axes = figure.subplots()
    axes.plot([0, 1], values)
    plain_log_scale(axes.yaxis)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    seen = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert set(ticks.split()) <= set(seen) and all(float(text) for text in seen)


SHEETS = ("log.sample_every=2", "log.prompts=[picture 1]", "log.sample_steps=1", "log.height=32", "log.width=32")


def test_a_sheet_that_is_not_finite_does_not_end_the_training(world, monkeypatch, capsys):
    run, folder = world
    forward = L2PTransformer2DModel.forward
    monkeypatch.setattr(
        L2PTransformer2DModel, "forward",
        lambda *a, **k: forward(*a, **k) * (1 if torch.is_grad_enabled() else float("nan")),
    )  # fmt: skip
    assert run("steps=2", *SHEETS) == 0
    assert "warning: no sample sheet: the image is not finite after step 1" in capsys.readouterr().out
    assert not (folder / "run/samples").exists() and (folder / "run/trained.safetensors").exists()


def test_wandb_goes_on_in_the_same_run(world, monkeypatch):
    """Against a stand-in of the package: what it is asked for, and that its errors are one line."""
    wandb = types.ModuleType("wandb")
    wandb.Error, wandb.Image, started, logged = type("Error", (Exception,), {}), lambda sheet: sheet.size, [], []
    board = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    wandb.init = lambda **settings: started.append(settings) or board
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run, folder = world
    run("log.board=wandb", "steps=2", *SHEETS)
    run("log.board=wandb", "steps=3", *SHEETS)
    assert [s["id"] for s in started] == [(folder / "run/wandb-id.txt").read_text()] * 2
    assert [step for step, values in logged if "loss" in values] == [1, 2, 3]
    assert (2, {"samples": (32, 32)}) in logged

    def refuse(**settings):
        raise wandb.Error("No API key configured.")

    wandb.init = refuse
    with pytest.raises(UserError, match="W&B: No API key configured. Or set WANDB_MODE=offline"):
        run("log.board=wandb", "steps=4")


def test_tensorboard_has_curves_and_sheets(world):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, folder = world
    run("log.board=tensorboard", "steps=2", *SHEETS)
    events = accumulator.EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2] and [e.step for e in events.Images("samples")] == [2]


def test_dry_run_of_a_run_to_be(world, capsys):
    run, folder = world
    assert run("--dry-run") == 0
    text = capsys.readouterr().out
    count = sum(p.numel() for p in tiny_model().parameters())
    assert f"{count / 1e3:.1f} k parameters" in text and "all_x_embedder" in text and "fits" in text
    assert not (folder / "run").exists()
    with pytest.raises(UserError, match="--processes must be at least 1, got 0"):
        run("--dry-run", "--processes=0")


def test_the_command_line_shows_one_line(tmp_path):
    command = [sys.executable, "-m", "l2p_fast.train", "optim.kid=x"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.strip() == "error: unknown setting optim.kid; did you mean kind?"
