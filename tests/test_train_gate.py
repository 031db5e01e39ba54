"""The trainer's gate: images are scored every few steps, and the best checkpoint stays whatever happens."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import save_clip
from tiny_training import run_ranks, world_in

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast.errors import UserError
from l2p_fast.evaluation import scoring
from l2p_fast.training import image_gate as gates
from l2p_fast.training import state as checkpoints
from l2p_fast.training.config import load_config
from l2p_fast.training.image_gate import Gate, grid_score, read_gate
from l2p_fast.training.parallel import Workers

torch.set_num_threads(1)
DRAWN = ("log.prompts=[picture 1, picture 2]", "log.sample_steps=1", "log.height=32", "log.width=32")


@pytest.fixture
def world(tmp_path):
    return world_in(tmp_path)


@pytest.fixture
def scores(monkeypatch):
    """Scores to be handed out in turn instead of those of the images."""
    left: list[float | None] = []

    def score(images, period):
        assert len(images) == 2 and images[0].size == (32, 32) and period == 16
        return left.pop(0)

    monkeypatch.setattr(gates, "grid_score", score)
    return left


def names(run):
    return [path.name for path in checkpoints.complete(run)]


def test_the_best_checkpoint_stays(world, scores, capsys):
    run, folder = world
    scores += [3.0, 1.5, 2.0, None, 1.7]
    assert run(*DRAWN, "gate.every=2", "keep=1", "save_every=3", "steps=10") == 0
    assert names(folder / "run") == ["step-00000004", "step-00000010"]
    lines = read_gate(folder / "run")
    assert [(line["step"], line["score"]) for line in lines] == [(2, 3.0), (4, 1.5), (6, 2.0), (10, 1.7)]
    said = capsys.readouterr().out
    assert "gate, step 4: grid 1.5000, the best so far" in said
    assert "gate, step 6: grid 2.0000, the best stays step-00000004" in said
    assert "gate, step 8: no smooth area in the images" in said
    assert not (folder / "run/samples").exists()  # no sheet was asked for
    best, last = (load_file(folder / f"run/{name}.safetensors") for name in ("trained-best", "trained"))
    held = checkpoints.TrainedTensors(folder / "run/checkpoints/step-00000004")
    for key, value in best.items():
        assert torch.equal(value, next(held.piece(key).chunks(value.dtype)))
    assert any(not torch.equal(best[key], last[key]) for key in last)


def test_a_resumed_run_keeps_the_best(world, scores):
    run, folder = world
    settings = [*DRAWN, "gate.every=2", "keep=1", "save_every=2", "log.sample_every=4"]
    scores += [1.2, 3.0, 2.5, 1.1]
    run(*settings, "steps=5")
    assert len(list((folder / "run/samples").iterdir())) == 1
    assert names(folder / "run") == ["step-00000002", "step-00000005"]
    log = folder / "run/gate.jsonl"  # of a later step than the checkpoint gone on from, as after a kill; and damage
    log.write_text(log.read_text() + json.dumps(json.loads(log.read_text().splitlines()[0]) | {"step": 9}) + "\n[\n")
    run(*settings, "steps=8")
    assert names(folder / "run") == ["step-00000008"]
    assert [line["step"] for line in read_gate(folder / "run")] == [2, 4, 6, 8]


# --- The gate alone --------------------------------------------------------------------------------------------------
def make_gate(folder, *overrides, done=99):
    config = load_config(None, [*DRAWN, "gate.every=2", *map(str, overrides)])
    return Gate(folder, config, 16, done, Workers(0, 1, torch.device("cpu")))


def scored(gate, *steps, images=None):
    for step in steps:
        place = checkpoints.place_of(gate.folder, step)
        place.mkdir(parents=True, exist_ok=True)
        (place / checkpoints.STATE).write_text("{}")
        gate.judge(step, images or [Image.new("RGB", (32, 32))] * 2, print)


def test_scores_of_another_kind_do_not_compare(tmp_path, scores):
    scores += [1.0, 5.0]
    scored(make_gate(tmp_path), 2)
    gate = make_gate(tmp_path, "log.prompts=[picture 3, picture 4]")
    assert gate.best is None
    scored(gate, 4)
    assert gate.best.name == "step-00000004" and make_gate(tmp_path).best.name == "step-00000002"


def test_the_best_is_one_whose_checkpoint_is_there(tmp_path, scores):
    scores += [2.0, 1.0, 3.0]
    scored(make_gate(tmp_path), 2, 4, 6)
    gate = make_gate(tmp_path)
    checkpoints.prune(tmp_path, 1, gate.best)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    gate.best.rename(tmp_path / "away")
    assert gate.best.name == "step-00000006"
    assert make_gate(tmp_path, done=5).best is None and len(read_gate(tmp_path)) == 2


def test_by_clip(tmp_path):
    score = save_clip(tmp_path / "clip")
    gate = make_gate(tmp_path, "gate.by=clip", f"gate.weights={tmp_path / 'clip'}")
    sets = [[Image.effect_noise((32, 32), 80).convert("RGB") for _ in range(2)] for _ in range(3)]
    for step, images in zip((2, 4, 6), sets, strict=True):
        scored(gate, step, images=images)
    wanted = [sum(score(image, f"picture {i + 1}") for i, image in enumerate(images)) / 2 for images in sets]
    assert [line["score"] for line in read_gate(tmp_path)] == pytest.approx(wanted, abs=1e-3)
    assert gate.best.name == f"step-{2 + 2 * wanted.index(max(wanted)):08d}"


def test_by_fid(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics", reason="pip install l2p_fast[evaluate]")

    class Means(torch.nn.Module):
        def forward(self, images):
            return images.float().mean(dim=(2, 3))

    monkeypatch.setitem(scoring.LOADERS, "inception", lambda path, device: Means())
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "reference").mkdir()
    for number in range(3):
        Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / f"reference/{number}.png")
    settings = "gate.by=fid", f"gate.weights={tmp_path / 'weights.pth'}", f"gate.reference={tmp_path / 'reference'}"
    gate = make_gate(tmp_path, *settings)
    scored(gate, 2, images=[Image.new("RGB", (32, 32), color) for color in ("red", "gray")])
    scored(gate, 4, images=[Image.new("RGB", (32, 32), color) for color in ("gray", "darkgray")])
    assert gate.best.name == "step-00000004" and list((tmp_path / "gate-features").iterdir())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gate.every=2"], "scores the images of log.prompts; give some"),
        ([*DRAWN, "gate.every=2", "gate.by=clip"], "gate.by=clip needs gate.weights"),
        ([*DRAWN, "gate.every=2", "gate.by=fid", "gate.weights=x"], "needs gate.reference"),
        ([*DRAWN, "gate.every=-1"], "gate.every must not be negative"),
        ([*DRAWN, "gate.every=2", "gate.by=clip", "gate.weights=nowhere"], "nowhere is no folder of a CLIP"),
        ([*DRAWN[:2], "gate.every=2", "log.height=40", "log.width=40"], "multiples of 16, got 40 x 40"),
    ],
)
def test_mistakes_end_in_a_line_before_the_first_step(world, overrides, says):
    run, folder = world
    with pytest.raises(UserError, match=says):
        run(*overrides, "steps=2")
    assert not checkpoints.complete(folder / "run")


def test_the_grid_score():
    smooth = Image.linear_gradient("L").convert("RGB")
    assert grid_score([smooth], 16) == pytest.approx(1, abs=0.1)
    noise = Image.effect_noise((64, 64), 200).convert("RGB")
    assert grid_score([smooth, noise], 16) is None
    patches = smooth.copy()
    for left in range(0, 256, 32):
        patches.paste(smooth.point(lambda value: min(255, value + 4)).crop((left, 0, left + 16, 256)), (left, 0))
    assert grid_score([patches], 16) > 3


@pytest.mark.slow
def test_on_two_processes(world):
    _, folder = world
    argv = [folder / "config.yaml", *DRAWN, "gate.every=2", "steps=4", "keep=1", "save_every=1"]
    run_ranks(2, argv, folder / "log")
    lines = read_gate(folder / "run")
    scored = {line["step"] for line in lines}
    assert scored <= {2, 4} and set(names(folder / "run")) <= {"step-00000002", "step-00000004"}
