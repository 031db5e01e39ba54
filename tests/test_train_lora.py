"""LoRA in training: what is trained and written, that it resumes and shards, and that other programs read it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_pipeline import FEATURES
from tiny_training import curve, make_world, run_ranks, tiny_model, world_in

from l2p_fast import convert, load_lora, load_model, train
from l2p_fast.errors import UserError
from l2p_fast.loading import build_empty
from l2p_fast.training import state as checkpoints
from l2p_fast.training.config import Config, LoraConfig, load_config
from l2p_fast.training.freeze import freeze
from l2p_fast.training.memory import expected, plan
from l2p_fast.training.merging import LORA_LAYOUTS
from l2p_fast.training.pairs import add_pairs, targets

torch.set_num_threads(1)
LORA = ("lora.rank=4", "lora.alpha=8", "optim.lr=0.05")
ONE = "data.grids=[{tokens: 4096, batch: 1}]"
BLOCKS = 5  # of the tiny model: three and a refiner of each kind


@pytest.fixture
def world(tmp_path):
    return world_in(tmp_path)


def test_pairs_alone(world):
    """They alone are trained and written, and over the base they are what was trained."""
    run, folder = world
    sheets = ("log.sample_every=3", "log.prompts=[picture 1]", "log.sample_steps=1", "log.height=32", "log.width=32")
    run(*LORA, "freeze.policy=", "steps=3", "ema.decay=0.5", *sheets)
    assert (folder / "run/samples/step-00000003.png").exists()
    assert not (folder / "run" / "trained.safetensors").exists()
    lora = load_file(folder / "run" / "lora.safetensors")
    assert len(lora) == 2 * 7 * BLOCKS == len(load_file(folder / "run" / "lora-ema.safetensors"))
    assert lora["transformer.layers.2.feed_forward.w1.lora_A.weight"].shape == (4, 32)
    assert all(value.any() for value in lora.values())
    place = checkpoints.complete(folder / "run")[-1]
    held = checkpoints.TrainedTensors(place)
    name = "layers.0.attention.to_out.0"
    down, up = (torch.cat(list(held.piece(f"{name}.lora_{x}.default.weight").chunks(torch.float32))) for x in "AB")
    model, base = load_model(folder / "base.safetensors"), load_model(folder / "base.safetensors")
    assert load_lora(model, folder / "run" / "lora.safetensors") == 7 * BLOCKS
    change = model.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(change, 2 * up @ down, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_it_learns_by_pairs(world):
    run, folder = world
    run(*LORA, "freeze.policy=pixels", "steps=40", "objective.grid=1", "optim.lr=1e-2", "save_every=100")
    losses = [loss for _, loss, _ in curve(folder / "run")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("patch", [16, 64])
def test_the_head_in_full_beside_pairs(tmp_path, patch):
    """Some layers of some blocks, head and embedding in full, at both patch sizes."""
    config = make_world(tmp_path, patch, side=2 * patch)
    settings = [
        *LORA,
        "freeze.policy=pixels",
        "lora.targets=['layers.[01].attention.*', adaLN_modulation.0]",
        "steps=2",
    ]
    train.main([str(config), *settings])
    trained, lora = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("trained", "lora"))
    assert {name.split(".")[0] for name in trained} == {"all_x_embedder", "local_decoder"}
    modules = {name.split(".lora_")[0] for name in lora}
    assert len(modules) == 2 * 4 + 4 and "transformer.layers.2.adaLN_modulation.0" in modules
    start = tiny_model(patch).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in trained.items())


def test_resuming_pairs_is_as_if_it_had_not_stopped(world):
    run, folder = world
    run(*LORA, "freeze.policy=pixels", "steps=4", f"run={folder / 'whole'}")
    run(*LORA, "freeze.policy=pixels", "steps=2", "ema.decay=0")
    run(*LORA, "freeze.policy=pixels", "steps=4")
    assert curve(folder / "run") == curve(folder / "whole")
    with pytest.raises(UserError, match="made with lora = .*'rank': 4.* now it is"):
        run("lora.rank=8", "freeze.policy=pixels", "steps=6")


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])  # 8 on two processes below
def test_pairs_over_frozen_weights_of_few_bits(world, bits):
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    run, folder = world
    run(*LORA, "freeze.policy=none", "steps=3")
    run(*LORA, "freeze.policy=none", "steps=3", f"run={folder / 'other'}", f"model.frozen_bits={bits}")
    lora = load_file(folder / "other" / "lora.safetensors")
    assert len(lora) == 2 * 7 * BLOCKS and all(value.any() for value in lora.values())
    for (_, ours, norm), (_, theirs, other) in zip(curve(folder / "run"), curve(folder / "other"), strict=True):
        assert theirs == pytest.approx(ours, rel=0.02) and other == pytest.approx(norm, rel=0.3)


def test_two_processes_train_pairs_as_one(tmp_path):
    """Sharded, over quantized blocks, with what is trained in full beside them."""
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    config = make_world(tmp_path)
    settings = [*LORA, "freeze.policy=pixels", "steps=4", "model.frozen_bits=8", "ema.decay=0.9", "optim.lr=1e-3"]
    train.main([str(config), *settings, f"run={tmp_path / 'one'}"])
    run_ranks(2, [config, *settings, f"run={tmp_path / 'two'}"], tmp_path / "log")
    for (_, ours, _), (_, theirs, _) in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    for name in ("lora", "lora-ema", "trained"):
        ours, theirs = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("one", "two"))
        assert all(torch.allclose(ours[key], theirs[key], atol=2e-3) for key in ours) and ours.keys() == theirs.keys()


def test_diffusers_own_pipeline_takes_the_file(world):
    """What the blocks share with a Z-Image changes it as it changes ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    run, folder = world
    run(*LORA, "freeze.policy=pixels", "lora.targets=[to_*, to_out.0, 'w?', t_embedder.*, cap_embedder.1]", "steps=2")
    source = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=FEATURES, axes_dims=(4, 6, 6), axes_lens=(64, 64, 64),
    )  # fmt: skip
    model, base = load_model(folder / "base.safetensors"), load_model(folder / "base.safetensors")
    count = load_lora(model, folder / "run" / "lora.safetensors")
    pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, source)
    before = {name: module.weight.clone() for name, module in source.named_modules()
              if getattr(module, "weight", None) is not None}  # fmt: skip
    pipe.load_lora_weights(folder / "run", weight_name="lora.safetensors")
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    changed = [name for name, weight in before.items() if not torch.equal(source.get_submodule(name).weight, weight)]
    assert len(changed) == count == 7 * BLOCKS + 3
    for name in changed:
        ours = model.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(source.get_submodule(name).weight - before[name], ours, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("settings", "words"), [
    (["freeze.policy=paper"], "layers.0.attention.to_q.* are trained in full; take freeze.policy=none"),
    (["lora.targets=[local_decoder.*]"], "no linear layer of the transformer is called local_decoder.*; there are"),
    (["lora.targets=[to_qkv]"], "called to_qkv; there are"),
    (["lora.targets=[]"], "lora.targets is empty"),
    (["lora.rank=-1"], "lora.rank must not be negative"),
    (["freeze.policy=none", "lora.rank=0"], "leaves nothing to train; give another, or lora.rank"),
])  # fmt: skip
def test_wrong_settings(world, settings, words):
    run, _ = world
    with pytest.raises(UserError, match=words):
        run(*LORA, *settings)


def test_the_policy_follows_the_rank():
    assert Config().freeze.policy == "published" and Config(lora=LoraConfig(rank=4)).freeze.policy == "none"
    assert load_config(None, ["lora.rank=4"]).freeze.policy == "none"
    assert load_config(None, ["lora.rank=4", "freeze.policy=pixels"]).freeze.policy == "pixels"


@pytest.mark.parametrize("patch", [16, 64])
def test_the_plan_counts_pairs(patch):
    """At the published size: rank 32 on all linear layers of all 34 blocks, frozen blocks in 4 bits."""
    config = load_config(None, ["lora.rank=32", "model.frozen_bits=4", f"model.patch_size={patch}", ONE])
    dim, hidden = 3840, 10240
    pairs = 34 * 32 * (4 * 2 * dim + 3 * (dim + hidden))
    model = build_empty({"all_patch_size": (patch,)})
    assert freeze(model, config.freeze, True) == []
    add_pairs(model, targets(model, config.lora), config, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pairs
    memory = expected(config, model)
    assert memory.gradients == 2 * pairs and memory.optimizer < 9 * pairs
    assert 3.5e9 < memory.weights < 3.8e9 and memory.total < (6.6e9 if patch == 16 else 7.8e9)
    assert "79.38 M: LoRA of rank 32 over 238 layers; in full: none" in plan(config, device_gb=16)


# --- convert ---
def test_merging_and_exporting_what_was_trained(world):
    """File and checkpoint alike, in every layout, and what was trained in full beside the pairs."""
    run, folder = world
    run(*LORA, "freeze.policy=pixels", "lora.targets=[to_q, to_v, w2]", "steps=2")
    place = checkpoints.complete(folder / "run")[-1]
    files = ("base", "run/trained", "run/lora", "both", "half", "rest")
    base, whole, lora, both, half, rest = (str(folder / f"{name}.safetensors") for name in files)
    convert.main(["merge", str(place), "--base", base, "--out", both])
    convert.main(["merge", whole, "--base", base, "--out", half])
    convert.main(["merge", lora, "--base", half, "--out", rest])
    both, rest, start = load_file(both), load_file(rest), tiny_model().state_dict()
    assert all(torch.allclose(both[key], rest[key], rtol=1e-4, atol=1e-6) for key in start)
    changed = {key for key in start if not torch.equal(both[key], start[key])}
    assert "layers.0.attention.to_k.weight" not in changed
    assert changed >= {f"layers.{i}.attention.to_q.weight" for i in range(3)} | load_file(whole).keys()

    wanted, out = load_model(half), str(folder / "out.safetensors")
    load_lora(wanted, lora)
    names = {}
    for layout in LORA_LAYOUTS:
        for source in (lora, str(place)):
            convert.main(["export-lora", source, "--base", base, "--layout", layout, "--overwrite", "--out", out])
            got, names[layout] = load_model(half), {name: value.shape for name, value in load_file(out).items()}
            load_lora(got, out)
            for (name, ours), theirs in zip(got.named_parameters(), wanted.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    stem = "diffusion_model.layers.0."
    assert names["comfyui"][f"{stem}attention.qkv.lora_A.weight"] == (8, 32)
    assert names["comfyui"][f"{stem}attention.qkv.lora_B.weight"] == (96, 8)
    assert f"{stem}feed_forward.w2.lora_A.weight" in names["comfyui"]
    assert f"{stem}attention.to_q.lora_A.weight" in names["ai-toolkit"]
    assert "transformer.layers.0.attention.to_q.lora_A.weight" in names["diffusers"]
    with pytest.raises(UserError, match="holds no LoRA"):
        convert.main(["export-lora", whole, "--base", base, "--overwrite", "--out", out])
