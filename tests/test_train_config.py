"""Configuration, freeze policies, objective, plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_pipeline import FEATURES, tiny_transformer

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast.errors import UserError
from l2p_fast.loading import build_empty
from l2p_fast.sampling import flow
from l2p_fast.train import main
from l2p_fast.training.config import Config, FreezeConfig, GridConfig, ObjectiveConfig, load_config
from l2p_fast.training.freeze import freeze
from l2p_fast.training.loop import schedule
from l2p_fast.training.memory import expected
from l2p_fast.training.objective import coarse_noise, draw_noise, draw_sigma, generator, losses, small_images

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load_config(path).steps > 0


def test_shipped_configurations_are_all_there():
    recipes = {"l2p-1k", "l2p-4k", "l2p-8k", "l2p-10k", "24gb", "distil-24gb", "lora", "tiny"}
    assert {path.stem for path in CONFIGS} == recipes


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
        ("optim.warmup=-5", "optim.warmup must not be negative"),
        ("optim.clip=-1", "optim.clip must not be negative"),
        ("minutes=-1", "minutes must not be negative"),
        ("data.grids=[{shift: -1}]", "data.grids.0.shift must not be negative"),
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


def sigmas(config, count=4000, **grid):
    return torch.tensor([draw_sigma(config, generator("test", i), GridConfig(**grid)) for i in range(count)])


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
    assert sigmas(ObjectiveConfig(), sigma_max=0.7).max() <= 0.7
    assert torch.equal(sigmas(ObjectiveConfig(sigma="continuous", shift=4.0), shift=1.0), uniform)  # the grid's own
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
    found = losses(lambda x, t, caps, windows: x0 - noise, x0, noise, torch.tensor([0.3, 0.9]), [])
    assert found.shape == (2,) and found.max() == 0


def drawn_batch():
    """Model, two pictures of 2 x 4 tokens, noise, noise levels, texts."""
    rng = generator("batch")
    x0, noise = torch.randn(2, 2, 3, 32, 64, generator=rng)
    texts = [torch.randn(n, FEATURES, generator=rng) for n in (3, 5)]
    return tiny_transformer(), x0, noise, torch.tensor([0.4, 0.8]), texts


def test_head_on_windows_is_the_head_on_parts():
    model, x0, noise, sigma, texts = drawn_batch()
    windows = [(0, 1, 1, 2), (1, 2, 1, 2)]
    x, t = flow.add_noise(x0, noise, sigma), 1 - sigma
    features = model.features(x, t, texts)
    found = model(x, t, texts, windows=windows)
    assert found.shape == (2, 3, 16, 32)
    for i, (r, c, h, w) in enumerate(windows):
        box = x[i : i + 1, :, 16 * r : 16 * (r + h), 16 * c : 16 * (c + w)]
        torch.testing.assert_close(
            found[i : i + 1], model.local_decoder(box, features[i : i + 1, :, r : r + h, c : c + w])
        )
    target = flow.target(x0, noise)
    error = (found[1] - target[1, :, 16:, 32:]).square().mean()
    torch.testing.assert_close(losses(model, x0, noise, sigma, texts, windows)[1], error)


def test_small_images_inside_the_head():
    """Every level's first channels, the bottleneck's too, reach the loss; a banded level is left out."""
    model, x0, noise, sigma, texts = drawn_batch()
    head = model.local_decoder
    with small_images(head) as found:
        model(x0, sigma, texts)
    assert sorted(p.shape for p in found) == [(2, 3, 32 >> k, 64 >> k) for k in range(len(head.levels), 0, -1)]
    plain, more = losses(model, x0, noise, sigma, texts), losses(model, x0, noise, sigma, texts, pyramid=2.0)
    x = flow.add_noise(x0, noise, sigma)
    with small_images(head) as found:
        model(x, 1 - sigma, texts)
    extra = sum((p - F.interpolate(x0, p.shape[-2:], mode="area")).square().mean(dim=(1, 2, 3)) for p in found)
    torch.testing.assert_close(more, plain + 2 * extra)
    more.mean().backward()
    assert all(p.grad is not None for p in head.parameters())
    head.band_rows = 16
    with small_images(head) as found:
        model(x0, sigma, texts)
    assert sorted(p.shape[2] for p in found) == [32 >> k for k in range(len(head.levels), head.table_banded - 1, -1)]
    assert not head.dec2[0]._forward_hooks


def test_noise_of_a_coarse_start():
    """At the level where the fine grid goes on, its noisy picture may be that of the blurred one."""
    x0 = torch.randn(3, 32, 32, generator=generator("fine"))
    blurred = F.interpolate(F.interpolate(x0[None], [8, 8], mode="area"), [32, 32], mode="bicubic")[0]
    noise, level = torch.zeros_like(x0), 0.8
    found = coarse_noise(noise, x0, 8, level, generator("blur"))
    blur = torch.rand((), generator=generator("blur")) * 2
    torch.testing.assert_close((1 - level) * x0 + level * found, (1 - level) * (x0 + blur * (blurred - x0)))


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


def test_plan_counts_whole_gradients_where_shards_accumulate():
    settings = ["parallel.fsdp=true", "data.grids=[{batch: 32}]"]
    model = build_empty({"all_patch_size": (16,)})
    freeze(model, load_config(None).freeze)
    at_once, in_four = (expected(load_config(None, [*settings, f"accumulation={n}"]), model, 8) for n in (1, 4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert in_four.gradients - at_once.gradients == 4 * trained
