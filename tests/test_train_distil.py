"""Distillation: the teacher is the model with its adapters off, and the student comes to do what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_pipeline import FEATURES
from tiny_training import curve, run_ranks, tiny_model, world_in

from l2p_fast.errors import UserError
from l2p_fast.formats.write import save_single_file
from l2p_fast.models.adapters import without_adapters
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.sampling import flow
from l2p_fast.training import distil
from l2p_fast.training.config import Config, LoraConfig, ObjectiveConfig, load_config
from l2p_fast.training.freeze import freeze
from l2p_fast.training.memory import plan
from l2p_fast.training.pairs import add_pairs, targets

torch.set_num_threads(1)
RECIPE = Path(__file__).parent.parent / "configs" / "distil-24gb.yaml"
LORA = ("lora.rank=4", "freeze.policy=none", "optim.lr=0.01")


def attentive(layers: int = 3) -> L2PTransformer2DModel:
    """A tiny model whose predictions depend on the prompts, which those of small random weights hardly do."""
    model = tiny_model(layers=layers).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4 if "local_decoder" not in name else 2 if weight.ndim > 1 else 1)
    return model


def with_pairs() -> L2PTransformer2DModel:
    model, config = attentive(), Config(lora=LoraConfig(rank=4))
    freeze(model, config.freeze, True)
    add_pairs(model, targets(model, config.lora), config, torch.float32)
    return model


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Two images, their noise and text features, and those of the empty prompt."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 3, 32, 32, generator=generator)
    texts = [torch.randn(length, FEATURES, generator=generator) for length in (3, 5, 2)]
    return x0, noise, texts[:2], texts[2]


@pytest.fixture
def world(tmp_path):
    run, folder = world_in(tmp_path)
    save_single_file(attentive(), folder / "base.safetensors")
    return run, folder


def test_the_teacher_is_the_model_without_pairs_bit_for_bit():
    model, plain = with_pairs(), attentive().requires_grad_(False)  # PyTorch has other kernels for frozen weights
    x0, noise, texts, _ = batch()
    given = x0, torch.tensor([0.2, 0.7]), texts
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_()
        with without_adapters(model):
            assert torch.equal(model(*given), plain(*given))
        assert not torch.allclose(model(*given), plain(*given))
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


def test_the_path_is_that_of_a_guided_sampler():
    """One Euler step of what is wanted ends where the sampler's steps do, from whichever level of the grid."""
    model = attentive()
    x0, noise, texts, empty = batch()
    config = ObjectiveConfig(kind="trajectory", grid=2, substeps=3, guidance=2.5)
    levels = flow.sigmas(6)
    sigma = levels[[0, 3]]
    x = flow.add_noise(x0, noise, sigma)
    with torch.no_grad():
        wanted = distil.along_path(model, x, sigma, texts, empty, config)
        for i, begin in enumerate((0, 3)):
            state = x[i : i + 1]
            for now, then in zip(levels[begin : begin + 3], levels[begin + 1 : begin + 4], strict=True):
                raw, negative = (model(state, 1 - now[None], [text]) for text in (texts[i], empty))
                state = flow.advance(state, flow.velocity(flow.guide(raw, negative, 2.5)), now, then)
            alone = distil.along_path(model, x[i : i + 1], sigma[i : i + 1], [texts[i]], empty, config)
            for prediction, most in ((alone, 1e-4), (wanted[i : i + 1], 1e-2)):  # this model enlarges rounding
                one = flow.advance(x[i : i + 1], flow.velocity(prediction), sigma[i], levels[begin + 3])
                assert (one - state).norm() < most * (state - x[i : i + 1]).norm()
    # a path of one step without guidance is what the student does already
    config = ObjectiveConfig(kind="trajectory", grid=2, substeps=1, guidance=1.0)
    assert distil.losses(with_pairs(), x0, noise, sigma, texts, empty, config).max() < 1e-6


@pytest.mark.parametrize("kind", ["guided", "trajectory"])
def test_the_student_comes_nearer_to_the_teacher(kind):
    """On the images it learns from; the teacher stays what it was."""
    model, config = with_pairs(), ObjectiveConfig(kind=kind, guidance=3.0, grid=2, substeps=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x0, noise, texts, empty = batch()
    levels = flow.sigmas(2)[:2]

    def distance(noise):
        x, sigma = flow.add_noise(x0, noise, levels), levels
        with torch.no_grad():
            with without_adapters(model):
                if kind == "guided":
                    wanted = distil.guided(model, x, sigma, texts, empty, 3.0)
                else:
                    wanted = distil.along_path(model, x, sigma, texts, empty, config)
            return (model(x, 1 - sigma, texts) - wanted).norm().item(), wanted

    (before, wanted), losses = distance(noise), []
    for _ in range(30):
        loss = distil.losses(model, x0, noise, levels, texts, empty, config).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after, still = distance(noise)
    assert torch.equal(still, wanted)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]) and after < 0.9 * before


@pytest.mark.parametrize("settings", [
    ("objective.kind=guided", "data.grids.0.head_crop=1"),
    ("objective.kind=trajectory", "objective.grid=2", "objective.substeps=2"),
])  # fmt: skip
def test_a_run_goes_on_as_if_it_had_not_stopped(world, settings):
    run, folder = world
    run(*LORA, *settings, "steps=4", f"run={folder / 'whole'}")
    run(*LORA, *settings, "steps=2")
    run(*LORA, *settings, "steps=4")
    assert curve(folder / "run") == curve(folder / "whole")
    assert all(value.any() for value in load_file(folder / "run" / "lora.safetensors").values())


@pytest.mark.slow
def test_two_processes_distil_as_one(world):
    run, folder = world
    settings = [*LORA, "objective.kind=guided", "steps=3"]
    run(*settings, f"run={folder / 'one'}")
    run_ranks(2, [folder / "config.yaml", *settings, f"run={folder / 'two'}"], folder / "log")
    for (_, ours, _), (_, theirs, _) in zip(curve(folder / "one"), curve(folder / "two"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize(("settings", "words"), [
    (["objective.kind=guided"], "objective.kind=guided learns from the base.*give lora.rank"),
    (["objective.kind=guided", "lora.rank=4", "freeze.policy=pixels"], "and freeze.policy=none"),
    (["objective.kind=guided", "lora.rank=4", "objective.pyramid=1"], "no images for objective.pyramid"),
    (["objective.kind=trajectory", "lora.rank=4", "objective.sigma=continuous"], "take objective.sigma=grid"),
    (["objective.kind=trajectory", "lora.rank=4", "data.grids=[{head_crop: 8}]"], "leave data.grids.0.head_crop out"),
    (["objective.kind=steps"], "objective.kind must be one of 'flow', 'guided', 'trajectory'"),
    (["objective.substeps=0"], "objective.substeps must be positive"),
])  # fmt: skip
def test_what_can_not_be(settings, words):
    with pytest.raises(UserError, match=words):
        load_config(None, settings)


def test_the_recipe_for_24_gb_fits():
    said = []
    for more in ([], ["objective.kind=trajectory", "objective.grid=4"]):
        said.append(plan(load_config(RECIPE, more), device_gb=24.0))
    assert all(text.endswith("fits") for text in said)
    assert "guided: 2 forward passes" in said[0] and "trajectory: 8 forward passes" in said[1]
    total = [float(text.split("total")[1].split()[0]) for text in said]
    plain = plan(load_config(RECIPE, ["objective.kind=flow"]), device_gb=24.0)
    assert total[0] == total[1] >= float(plain.split("total")[1].split()[0]) and "forward passes" not in plain
