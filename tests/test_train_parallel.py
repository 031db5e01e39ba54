"""Two processes (gloo, CPU) train as one does, and each goes on where the other stopped."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_training import curve, make_world, run_ranks

from l2p_fast import convert
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.train import main
from l2p_fast.training import state as checkpoints
from l2p_fast.training.config import OptimConfig
from l2p_fast.training.monitor import read_log
from l2p_fast.training.optim import AdamW
from l2p_fast.training.parallel import local
from l2p_fast.training.shards import Shards

torch.set_num_threads(1)
EXACT, BITS_8 = ("adamw", 1e-5), ("adamw8bit", 1e-3)  # optimizer, tolerance; the other one of each test is slow


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def close(ours, theirs, tolerance):
    ours, theirs = curve(ours), curve(theirs)
    assert len(ours) == len(theirs)
    for (step, loss, _), (_, other, _) in zip(ours, theirs, strict=True):
        assert abs(loss - other) < tolerance, f"step {step}: {loss} and {other}"


def needs(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")


@pytest.mark.parametrize(("kind", "tolerance"), [EXACT, slow(*BITS_8)])
def test_two_processes_train_as_one(tmp_path, kind, tolerance):
    needs(kind)
    config = make_world(tmp_path)
    settings = [f"optim.kind={kind}", "steps=6", "save_every=100", "optim.clip=1", "data.grids.0.batch=4"]
    main([str(config), *settings, f"run={tmp_path / 'one'}"])
    run_ranks(2, [config, *settings, "accumulation=2", f"run={tmp_path / 'two'}"], tmp_path / "log")
    close(tmp_path / "one", tmp_path / "two", tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [EXACT, BITS_8])
def test_two_nodes_of_two_train_as_one(tmp_path, kind, tolerance):
    """Shared within a node, copied across them; then all four processes' states are read by one."""
    needs(kind)
    config = make_world(tmp_path)
    settings = [f"optim.kind={kind}", "save_every=3", "optim.clip=1", "data.grids.0.batch=4"]
    main([str(config), *settings, "steps=5", f"run={tmp_path / 'one'}"])
    four = [*settings, f"run={tmp_path / 'four'}"]
    run_ranks(4, [config, *four, "accumulation=1", "steps=3", "--hybrid"], tmp_path / "log", node=2)
    main([str(config), *four, "steps=5"])
    close(tmp_path / "one", tmp_path / "four", tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), [slow(*EXACT), BITS_8])
@pytest.mark.parametrize("first", [1, 2])
def test_saved_on_some_processes_resumed_on_others(tmp_path, kind, tolerance, first):
    needs(kind)
    config = make_world(tmp_path)
    settings = [f"optim.kind={kind}", "save_every=100", "ema.decay=0.9", f"run={tmp_path / 'changed'}"]
    whole = [*settings[:-1], f"run={tmp_path / 'whole'}", "steps=4"]
    main([str(config), *whole])
    for world, steps in ((first, 2), (3 - first, 4)):
        if world == 1:
            main([str(config), *settings, f"steps={steps}"])
        else:
            run_ranks(2, [config, *settings, f"steps={steps}"], tmp_path / "log")
    assert checkpoints.read_state(checkpoints.complete(tmp_path / "changed")[-1])[0].world == 3 - first
    close(tmp_path / "whole", tmp_path / "changed", tolerance)
    for name in ("trained", "trained-ema"):
        ours, theirs = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("changed", "whole"))
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)
    out = tmp_path / "merged.safetensors"
    place = checkpoints.complete(tmp_path / "changed")[-1]
    convert.main(["merge", str(place), "--base", str(tmp_path / "base.safetensors"), "--out", str(out)])
    Checkpoint(out).demand("l2p")


def test_states_move_between_processes_bit_for_bit(tmp_path):
    """8-bit states of two processes, read by one, are the bytes that the two wrote."""
    needs("adamw8bit")
    config = make_world(tmp_path)
    settings = ["optim.kind=adamw8bit", "save_every=100", f"run={tmp_path / 'run'}"]
    run_ranks(2, [config, *settings, "steps=3"], tmp_path / "log")
    [place] = checkpoints.complete(tmp_path / "run")
    held = Shards(place, ["rank-00000.safetensors", "rank-00001.safetensors"])
    eight = [name for name in held.shapes if name.endswith(".m_scale")]
    assert eight and all(held.dtypes[name.removesuffix("_scale")] == torch.uint8 for name in eight)
    assert all(len(held.parts[name]) == 2 for name in eight)  # both wrote their rows
    written = {name: torch.cat(list(held.chunks(name))) for name in held.shapes}
    main([str(config), *settings, "steps=3", f"--resume={place}", f"run={tmp_path / 'one'}"])
    [copy] = checkpoints.complete(tmp_path / "one")
    alone = Shards(copy, ["rank-00000.safetensors"])
    assert alone.shapes == held.shapes
    assert all(torch.equal(torch.cat(list(alone.chunks(name))), value) for name, value in written.items())


@pytest.mark.parametrize(("weights", "bits"), [("bfloat16", 8), ("float32", 4)])
def test_fused_updates_and_shared_quantized_blocks(tmp_path, weights, bits):
    needs("adamw8bit")
    config = make_world(tmp_path)
    settings = [f"model.weights={weights}", "model.compute=bfloat16", "optim.kind=adamw8bit", "optim.fused=true",
                f"model.frozen_bits={bits}", "steps=4", "log.sample_every=3", "log.prompts=[picture 1]",
                "log.sample_steps=1", "log.height=32", "log.width=32"]  # fmt: skip
    main([str(config), *settings, f"run={tmp_path / 'one'}"])
    run_ranks(2, [config, *settings, f"run={tmp_path / 'two'}"], tmp_path / "log")
    close(tmp_path / "one", tmp_path / "two", 0.02)
    assert (tmp_path / "two/samples/step-00000003.png").exists()


@pytest.mark.parametrize(("missing", "code"), [(2, 0), (3, 2)])
def test_unreadable_pictures_count_once(tmp_path, missing, code):
    config = make_world(tmp_path)
    for number in range(missing):
        (tmp_path / "data" / f"{number}.png").unlink()
    run_ranks(2, [config, "data.max_bad_share=0.2", "steps=10", f"run={tmp_path / 'run'}"], tmp_path / "log", code)
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    if code:
        assert all("error: 3 of 10 images can't be read" in text for text in said)
    else:
        assert [text.count(f"{number}.png") for text in said for number in range(missing)] == [1, 1, 0, 0]
        assert read_log(tmp_path / "run")[-1]["bad_images"] == missing


def test_fp32_weights_with_bf16_products(tmp_path):
    config = make_world(tmp_path)
    settings = ["model.compute=bfloat16", "steps=2", "freeze.policy=published"]
    main([str(config), *settings, f"run={tmp_path / 'one'}"])
    run_ranks(2, [config, *settings, "--hybrid", f"run={tmp_path / 'two'}"], tmp_path / "log")
    close(tmp_path / "one", tmp_path / "two", 0.02)


def test_copies_of_a_shard_are_rounded_alike():
    """As if this were process 1 of 4, without the others."""

    def rounded(ranks: list | None = None) -> torch.Tensor:
        def place(values):
            if ranks is None:
                return values
            mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard"))
            return DTensor.from_local(values, mesh, [Replicate(), Shard(0)], run_check=False)

        weight = torch.nn.Parameter(place(torch.full((64, 8), 1.0).bfloat16()))
        weight.grad = place(torch.full((64, 8), 0.5).bfloat16())
        AdamW({"w": weight}, OptimConfig("adamw", lr=1e-3)).step()
        return local(weight).detach().clone()

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        first_shard, second_shard = rounded([[0, 2], [1, 3]]), rounded([[0, 1], [2, 3]])
    finally:
        dist.destroy_process_group()
    assert torch.equal(first_shard, rounded())
    assert not torch.equal(second_shard, rounded())
