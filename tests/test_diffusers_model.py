"""What a user of diffusers expects of a model: offloading, casting, caches, variants, single files."""

import contextlib
from unittest import mock

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from safetensors.torch import load_file

from l2p_fast.errors import UserError
from l2p_fast.models.detailer import DetailerHead
from l2p_fast.models.zimage import L2PTransformer2DModel

TIMES = torch.tensor([0.0, 0.25, 0.5, 0.75])


def tiny(seed=0, **config):
    torch.manual_seed(seed)
    body = dict(dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=(4, 6, 6))
    model = L2PTransformer2DModel(**body, head_width=0.125, **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(seed=0):
    torch.manual_seed(100 + seed)
    return torch.randn(2, 3, 48, 64), [torch.randn(n, 24) for n in (5, 40)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def run(model, prepared=True):
    """(4, 2, 3, 48, 64): predictions at `TIMES`, as a run of sampling makes them, or each alone."""
    pixels, texts = inputs()
    cond = model.prepare(texts, 48, 64, timesteps=TIMES) if prepared else None
    out = []
    for i, time in enumerate(TIMES):
        given = dict(cond=cond, step=i) if prepared else dict(t=time.expand(2), cap_feats=texts)
        with model.cache_context("both"):
            out.append(model(pixels + 0.1 * i, **given))
    return torch.stack(out)


# --- Offloading and casting ------------------------------------------------------------------------------------------
HOW = [dict(num_blocks_per_group=1), dict(num_blocks_per_group=2), dict(offload_type="leaf_level")]


def expected_with(how, model, *args):
    """What an offloaded ``model`` should give. Leaf by leaf, the head's convolutions are called, so no kernels run."""
    leaves = how.get("offload_type") == "leaf_level"
    with mock.patch.object(DetailerHead, "kernels", return_value=None) if leaves else contextlib.nullcontext():
        return run(model, *args)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_group_offload(how, prepared):
    model = tiny()
    expected = expected_with(how, model, prepared)
    keys = model.state_dict().keys()
    model.enable_group_offload(onload_device=torch.device("cpu"), **{"offload_type": "block_level"} | how)
    assert torch.equal(run(model, prepared), expected)
    assert model.state_dict().keys() == keys and {"cap_embedder.0.weight", "cap_embedder.1.bias"} < keys


@pytest.mark.parametrize("how", HOW)
def test_group_offload_to_disk(tmp_path, how):
    model = tiny()
    expected = expected_with(how, model)
    how = {"offload_type": "block_level", "offload_to_disk_path": str(tmp_path)} | how
    model.enable_group_offload(torch.device("cpu"), **how)
    assert any(tmp_path.iterdir())
    assert torch.equal(run(model), expected)


def test_layerwise_casting():
    model = tiny().bfloat16()
    plain = run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.layers[0].feed_forward.w1.weight.dtype == torch.float8_e4m3fn
    assert model.head.out_conv.weight.dtype == torch.float8_e4m3fn
    assert model.cap_embedder[1].weight.dtype == model.layers[0].ffn_norm1.weight.dtype == torch.bfloat16
    out = run(model)
    assert out.dtype == torch.bfloat16 and (out - plain).norm() < 0.3 * plain.norm()


# --- Caches ----------------------------------------------------------------------------------------------------------
def broadcast(skip):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip, current_timestep_callback=lambda: 400
    )


CAREFUL = {
    "first block": FirstBlockCacheConfig(threshold=0.0),
    "magnitude": MagCacheConfig(threshold=0.0, num_inference_steps=4, mag_ratios=[1.0, 0.9, 0.9, 0.9]),
    "broadcast": broadcast(1),
    "taylor": TaylorSeerCacheConfig(disable_cache_before_step=4),
}
BOLD = {
    "first block": FirstBlockCacheConfig(threshold=1e3),
    "magnitude": MagCacheConfig(threshold=1e3, retention_ratio=0.25, num_inference_steps=4, mag_ratios=[1.0] * 4),
    "broadcast": broadcast(2),
    "taylor": TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=1, max_order=0),
}


@pytest.mark.parametrize("name", CAREFUL)
@pytest.mark.parametrize("prepared", [True, False])
def test_a_cache_that_skips_nothing_changes_nothing(name, prepared):
    model = tiny()
    expected = run(model, prepared)
    model.enable_cache(CAREFUL[name])
    assert torch.equal(run(model, prepared), expected)
    model.disable_cache()
    assert torch.equal(run(model, prepared), expected)


@pytest.mark.parametrize("name", BOLD)
def test_a_cache_that_skips(name):
    model, calls = tiny(), []
    expected = run(model)
    part = model.layers[1].attention.to_q
    part.register_forward_hook(lambda *_: calls.append(1))
    model.enable_cache(BOLD[name])
    out = run(model)
    assert len(calls) < len(TIMES) and torch.equal(out[0], expected[0])
    assert 1e-6 < (out - expected).norm() / expected.norm() < 0.5
    model._reset_stateful_cache()  # what a pipeline does after a run
    assert torch.equal(run(model), out)


def test_contexts_are_kept_apart():
    """Sizes, and parts of a batch, each in a context of their own."""
    model = tiny()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    with torch.no_grad():
        for name, size in (("small", 32), ("large", 64), ("small", 32)):
            with model.cache_context(name):
                assert model(torch.zeros(1, 3, size, size), torch.ones(1), inputs()[1][:1]).shape[-1] == size


@pytest.mark.parametrize("config", [FasterCacheConfig(), TaylorSeerCacheConfig(use_lite_mode=True)])
def test_caches_that_do_not_fit(config):
    with pytest.raises(UserError, match="choose from FirstBlockCache, MagCache"):
        tiny().enable_cache(config)


# --- Files -----------------------------------------------------------------------------------------------------------
def test_variants(tmp_path):
    model = tiny().half()
    model.save_pretrained(tmp_path, variant="fp16")
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    loaded = L2PTransformer2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        L2PTransformer2DModel.from_pretrained(tmp_path)


def test_variants_in_shards(tmp_path):
    model = tiny().half()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.fp16-0000*.safetensors"))) > 1
    loaded = L2PTransformer2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_single_file(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = L2PTransformer2DModel.from_single_file(file, axes_dims=(4, 6, 6))
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert same(loaded.state_dict(), load_file(file))
    assert L2PTransformer2DModel.from_single_file(str(file), torch_dtype=torch.float32).dtype == torch.float32
    with pytest.raises(UserError, match="nothing.safetensors"):
        L2PTransformer2DModel.from_single_file(tmp_path / "nothing.safetensors")
