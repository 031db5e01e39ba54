"""The small world: its pictures, its scorer, and the training loop that the bundled models came from."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="the small world needs scipy: pip install l2p_fast[tiny]")

from examples.tiny import __main__ as command
from examples.tiny import fit, transfer, world
from examples.tiny.scorer import matches, read
from l2p_fast.errors import UserError


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    prompts = world.evaluation_prompts(40)
    return prompts, [read(world.draw(world.draw_scene(rng, prompt), 256, 256)) for prompt in prompts]


def test_scorer_reads_the_renderers_pictures(pictures):
    prompts, things = pictures
    assert np.mean([matches(p, t) for p, t in zip(prompts, things, strict=True)]) >= 0.98


def test_scorer_refuses_shuffled_prompts(pictures):
    prompts, things = pictures
    order = np.random.default_rng(1).permutation(len(prompts))
    assert np.mean([matches(prompts[i], t) for i, t in zip(order, things, strict=True)]) <= 0.1


@pytest.mark.parametrize("size", [(128, 128), (512, 512), (256, 512), (640, 384)])
def test_scorer_at_other_sizes(size):
    rng = np.random.default_rng(2)
    prompts = [world.draw_prompt(rng, task) for task in world.TASKS for _ in range(4)]
    scenes = [world.draw_scene(rng, prompt, *size) for prompt in prompts]
    right = [matches(p, read(world.draw(s, *size))) for p, s in zip(prompts, scenes, strict=True)]
    assert np.mean(right) >= 0.95


def test_prompts_are_the_same_every_time_and_parse_back():
    prompts = world.evaluation_prompts(5)
    assert prompts == world.evaluation_prompts(5) and {p.task for p in prompts} == set(world.TASKS)
    for prompt in prompts:
        parsed = world.Prompt.parse(prompt.text)
        assert (parsed.groups, parsed.relation) == (prompt.groups, prompt.relation)
    assert world.Prompt.parse("a photo of a cat") is None
    assert world.Prompt.parse("A red star above two blue circles").text == "a red star above two blue circles"


def test_relations_need_the_named_side():
    left, right = np.array([[0.2, 0.5], [0.3, 0.4]]), np.array([[0.7, 0.5]])
    assert world.relation_holds("left of", left, right) and world.relation_holds("right of", right, left)
    assert not world.relation_holds("left of", right, left) and not world.relation_holds("above", left, right)


def test_window_is_a_part_of_the_picture():
    rng = np.random.default_rng(3)
    scene = world.draw_scene(rng, world.Prompt.parse("two red rings above a black star"))
    whole = world.draw(scene, 512, 512)
    np.testing.assert_array_equal(world.draw(scene, 512, 512, (96, 160, 200, 131)), whole[:, 96:296, 160:291])


def test_large_pictures_hold_more_detail():
    scene = world.draw_scene(np.random.default_rng(4), world.Prompt.parse("a red square"))
    rough = [np.abs(np.diff(world.draw(scene, s, s, (0, 0, 64, 64))[0], axis=1)).max() for s in (256, 4096)]
    assert rough[0] < 1e-3 < 0.02 < rough[1]


def _train(folder, steps, stop=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = fit.Optimizer(model.named_parameters(), 1e-2, lambda name, p: p.ndim == 2)

    def loss_of(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x).square().mean()

    fit.fit("test", model, optimizer, loss_of, folder=folder, minutes=10, max_steps=steps, save_every=0)
    return model.state_dict()


def test_fit_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = _train(tmp_path / "a", 60)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "b", 60, stop=25)
    again = _train(tmp_path / "b", 60)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 50


def test_transfer_starts_from_the_source_and_the_smaller_patch():
    from diffusers import ZImageTransformer2DModel

    config = {"dim": 32, "n_layers": 5, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 8,
              "axes_dims": [8, 12, 12], "axes_lens": [64, 16, 16]}  # fmt: skip
    source = ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, **config)
    small = transfer.initial_model(source, 16)
    assert torch.equal(small.layers[2].attention.to_q.weight, source.layers[2].attention.to_q.weight)
    large = transfer.initial_model(small, 64)
    patch = torch.randn(1, 3, 16, 16)
    enlarged = patch.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(small.embed_image(patch)[:, 0], large.embed_image(enlarged)[:, 0])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["corpus"], "train it first"),
        (["transfer", "--patch-size", "64"], "patch-16"),
        (["score", "--per-task", "0"], "must be above 0"),
        (["ldm", "--device", "quantum"], "no device"),
    ],
)
def test_wrong_order_and_wrong_values(tmp_path, argv, says):
    with pytest.raises(UserError, match=says):
        command.main([*argv, "--folder", str(tmp_path)])


def test_training_pictures_follow_their_seed():
    from examples.tiny.ldm import random_pictures

    first, again, other = (next(random_pictures(*seed))[:2] for seed in ((4, 7), (4, 7), (4, 8)))
    assert first == again and first != other
