"""Configuration, freeze policies, objective, plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_transformer

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast import flow
from l2p_fast.checkpoint import build_empty
from l2p_fast.errors import UserError
from l2p_fast.train import main, schedule
from l2p_fast.training.config import Config, FreezeConfig, ObjectiveConfig, load_config
from l2p_fast.training.freeze import freeze
from l2p_fast.training.memory import expected
from l2p_fast.training.objective import draw_noise, draw_sigma, generator, losses

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load_config(path).steps > 0


def test_shipped_configurations_are_all_there():
    assert {path.stem for path in CONFIGS} == {"l2p-1k", "l2p-4k", "l2p-8k", "l2p-10k", "24gb", "tiny"}


def test_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: 5e-5}\ndata: {grids: [{tokens: 64}, {tokens: 16, share: 2}]}")
    config = load_config(tmp_path / "c.yaml", ["optim.fused=true", "data.grids.1.batch=4", "freeze.policy=[layers.*]"])
    assert config.optim.lr == 5e-5 and config.optim.fused
    assert [grid.batch for grid in config.data.grids] == [8, 4] and config.freeze.policy == ["layers.*"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "did you mean lr"),
        ("optim.kind=sgd", "must be one of 'adamw8bit', 'adamw'"),
        ("optim.lr=fast", "optim.lr must be of type float"),
        ("steps=0", "steps must be positive"),
        ("steps=true", "steps must be of type int"),
        ("data.grids.3.batch=1", "no such place"),
        ("data.grids=[]", "data.grids is empty"),
        ("optim", "key=value"),
        ("data.max_aspect=0.5", "at least 1"),
        ("model=big", "model must hold keys and values"),
    ],
)
def test_wrong_settings(override, says):
    with pytest.raises(UserError, match=says):
        load_config(None, [override])


def test_fused_needs_one_pass_and_no_clipping():
    for extra in ("accumulation=2", "optim.clip=1"):
        with pytest.raises(UserError, match="optim.fused|optim.clip"):
            load_config(None, ["optim.fused=true", extra])


def test_published_policy_trains_what_the_published_trainer_does():
    for patch, trained in ((16, 2.548e9), (64, 2.593e9)):
        model = build_empty({"all_patch_size": (patch,)})
        names = freeze(model, FreezeConfig("published", 5))
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        assert sum(sizes[name] for name in names) == pytest.approx(trained, rel=2e-4)
        frozen = {name.split(".")[1] for name in sizes.keys() - set(names)}
        assert frozen == {str(i) for i in range(5, 25)}


def test_other_policies():
    model = tiny_transformer()
    assert len(freeze(model, FreezeConfig("full"))) == len(list(model.parameters()))
    paper = freeze(model, FreezeConfig("paper", 1))
    assert {name.split(".")[0] for name in paper} == {"all_x_embedder", "layers", "local_decoder"}
    assert freeze(model, FreezeConfig(["local_decoder.out_conv.*"])) == [
        "local_decoder.out_conv.weight", "local_decoder.out_conv.bias",
    ]  # fmt: skip
    assert [n for n, p in model.named_parameters() if p.requires_grad] == freeze(model, FreezeConfig(["*out_conv.*"]))
    for policy in ("some", ["nothing.*"]):
        with pytest.raises(UserError, match="freeze.policy"):
            freeze(model, FreezeConfig(policy))


def sigmas(config, count=4000, highest=1.0):
    return torch.tensor([draw_sigma(config, generator("test", i), highest) for i in range(count)])


def test_grid_levels_are_the_samplers():
    drawn = sigmas(ObjectiveConfig(grid=20, shift=3.0))
    levels = flow.sigmas(20, 3.0)[:-1]
    nearest = (drawn[:, None] - levels).abs().min(dim=1)
    assert nearest.values.max() < 1e-6 and nearest.indices.bincount().min() > 120  # all levels, alike often


def test_other_laws_of_sigma():
    uniform = sigmas(ObjectiveConfig(sigma="continuous", shift=1.0))
    assert abs(uniform.mean() - 0.5) < 0.02 and 0 < uniform.min() and uniform.max() <= 1
    shifted = sigmas(ObjectiveConfig(sigma="continuous", shift=4.0))
    assert torch.allclose(shifted.median(), torch.tensor(0.8), atol=0.02)
    normal = sigmas(ObjectiveConfig(sigma="logit_normal", mean=0.5, std=0.8, shift=1.0))
    assert torch.allclose(normal.logit().mean(), torch.tensor(0.5), atol=0.05)
    assert sigmas(ObjectiveConfig(), highest=0.7).max() <= 0.7
    mixed = sigmas(ObjectiveConfig(sigma="continuous", shift=4.0, uniform_share=0.5))
    assert uniform.mean() + 0.05 < mixed.mean() < shifted.mean() - 0.05


def test_noise_by_seed_or_fresh():
    shape = (3, 8, 8)
    fixed, fresh = ObjectiveConfig(noise="seed"), ObjectiveConfig(noise="fresh")
    assert torch.equal(draw_noise(fixed, shape, 7, generator(1)), draw_noise(fixed, shape, 7, generator(2)))
    known = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise(fixed, shape, 7, generator(1)), known)
    assert not torch.equal(draw_noise(fresh, shape, 7, generator(1)), draw_noise(fresh, shape, 7, generator(2)))
    assert not torch.equal(draw_noise(fixed, shape, None, generator(1)), draw_noise(fixed, shape, None, generator(2)))


def test_objective_is_zero_for_the_right_answer():
    x0, noise = torch.randn(2, 2, 3, 16, 16, generator=generator(0))
    found = losses(lambda x, t, caps: x0 - noise, x0, noise, torch.tensor([0.3, 0.9]), [])
    assert found.shape == (2,) and found.max() == 0


def test_schedule():
    config = Config(steps=100)
    config.optim.warmup, config.optim.schedule = 10, "cosine"
    values = [schedule(config, step, 0.0) for step in range(100)]
    assert values[0] == 0.1 and values[9] > 0.9 and values[50] == pytest.approx(0.5) and values[99] < 0.01
    config.minutes = 1.0
    assert schedule(config, 50, 60.0) == pytest.approx(0.0)


def test_plan_of_the_24_gb_configuration(capsys):
    """The 1K model at batch 1, 2.55 B trained, stays within 18 GB."""
    assert main([str(CONFIGS[[p.stem for p in CONFIGS].index("24gb")]), "--dry-run", "--device-gb", "24"]) == 0
    text = capsys.readouterr().out
    assert "6.166 G parameters" in text and "trained    2.548 G" in text and "24.0 GB: fits" in text
    total = float(text.split("total")[1].split()[0])
    assert 12 < total < 18
    assert main(["--dry-run", "--device-gb", "24", "model.patch_size=16"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_plan_of_4k_on_one_card():
    config = load_config(next(p for p in CONFIGS if p.stem == "24gb"), ["data.grids.0.batch=1"])
    model = build_empty({"all_patch_size": (64,)})
    freeze(model, config.freeze)
    assert expected(config, model).total < 21e9
