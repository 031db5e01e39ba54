"""The model: agreement with goldens and diffusers' Z-Image body, exact batches, hoisting, and what diffusers offers."""

import hashlib

import goldens
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_z_image import RopeEmbedder, ZImageTransformer2DModel

from l2p_fast.errors import UserError
from l2p_fast.formats.shapes import PIXEL_PARTS
from l2p_fast.formats.write import save_single_file
from l2p_fast.models.blocks import rope_tables
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.sampling import flow

SAME = 5e-6  # equal but for fp32 rounding, which may differ with a tensor's place in memory
BODY = dict(
    dim=64,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=24,
    axes_dims=(8, 12, 12),
    axes_lens=(256, 64, 64),
)


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def tiny(patch=16, seed=0, **config):
    torch.manual_seed(seed)
    model = L2PTransformer2DModel(all_patch_size=(patch,), **{**BODY, "head_width": 0.25, **config})
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # norms and biases of their own, so that none can be forgotten unseen
                p.add_(0.2 * torch.randn_like(p))
            if p.ndim == 4:  # the default fades: a change of the body would hardly reach the result
                p.mul_(2.5)
    return model.eval()


def inputs(height, width, lengths, seed=0):
    torch.manual_seed(100 + seed)
    batch = len(lengths)
    return torch.randn(batch, 3, height, width), torch.rand(batch), [torch.randn(n, 24) for n in lengths]


@torch.no_grad()
def test_blocks_are_named_in_order_of_execution():
    model = tiny()
    names = [name for name, _ in model.blocks()]
    assert names == ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]
    ran = []
    for name, block in model.blocks():
        assert model.get_submodule(name) is block
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.forward(*inputs(64, 64, [5]))
    assert sorted(ran) == sorted(names) and [n for n in ran if n in names[2:]] == names[2:]
    modulations = model.prepare([torch.randn(5, 24)], 64, 64, timesteps=torch.tensor([0.5])).modulations
    assert len(modulations) == len(model.modulated_blocks) == 3
    assert model.head is model.local_decoder
    assert {name.split(".")[0] + "." for name in model.state_dict()} > set(model.pixel_parts)
    assert {name.split(".")[0] + "." for name in model.state_dict()} > set(PIXEL_PARTS)


# --- Agreement -------------------------------------------------------------------------------------------------------
def golden_model(patch):
    config, weights, io, stride = goldens.golden(patch)
    model = L2PTransformer2DModel(**config)
    model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    return model.eval(), io, (..., slice(None, None, stride), slice(None, None, stride))


@pytest.mark.parametrize("patch", [16, 64, 160])
@torch.no_grad()
def test_goldens(patch):
    model, io, kept = golden_model(patch)
    cases = sorted({key.split(".")[0] for key in io} - {"sample"})
    assert cases
    for case in cases:
        pixels, t, raw = io[f"{case}.pixels"], io[f"{case}.t"], io[f"{case}.raw"]
        caps = [io[f"{case}.cap{i}"] for i in range(len(pixels))]
        assert error(model(pixels, t, caps)[kept], raw) <= 1e-5, case
        cond = model.prepare(caps, *pixels.shape[-2:], timesteps=t[:1])
        if len(pixels) == 1:
            assert error(model(pixels, cond=cond, step=0)[kept], raw) <= 1e-5, case
        model.local_decoder.band_rows = 64
        assert error(model(pixels, t, caps)[kept], raw) <= 1e-5, case
        model.local_decoder.band_rows = None


@torch.no_grad()
def test_golden_run():
    model, io, kept = golden_model(16)
    sigmas = flow.sigmas(6)
    torch.testing.assert_close(sigmas[:-1], io["sample.sigmas"])
    x = io["sample.noise"]
    cond = model.prepare([io["sample.pos"], io["sample.neg"]], *x.shape[-2:], timesteps=1 - sigmas[:-1])
    for i in range(6):
        v_pos, v_neg = flow.velocity(model(x.expand(2, -1, -1, -1), cond=cond, step=i)).split(1)
        x = flow.advance(x, flow.guide(v_pos, v_neg, 2.0), sigmas[i], sigmas[i + 1])
    assert error(x[kept], io["sample.final"]) <= 1e-4


class Reference:
    """diffusers' Z-Image body, cut before its final layer, and the head written plainly, with ``model``'s weights."""

    def __init__(self, model, dtype=torch.float32):
        self.patch, self.head, self.dtype = model.patch_size, model.local_decoder, dtype
        self.body = ZImageTransformer2DModel(all_patch_size=(self.patch,), in_channels=3, **BODY)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("local_decoder.")}
        missing, unexpected = self.body.load_state_dict(state, strict=False)
        assert not unexpected and all(key.startswith("all_final_layer.") for key in missing)
        self.body.to(dtype).eval()
        self.final = self.body.all_final_layer[f"{self.patch}-1"]

    def __call__(self, pixels, t, caps):
        h, w = (n // self.patch for n in pixels.shape[-2:])
        raw = []
        for x, time, cap in zip(pixels, t, caps, strict=True):  # one by one: no neighbours
            seen = []
            hook = self.final.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
            self.body([x[:, None].to(self.dtype)], time[None], [cap.to(self.dtype)], patch_size=self.patch)
            hook.remove()
            features = seen[0][:, : h * w].transpose(1, 2).unflatten(2, (h, w))
            raw.append(self.head.forward_reference(x[None], features))
        return torch.cat(raw)


@pytest.mark.parametrize(
    "patch,height,width,lengths,seed",
    [
        (16, 80, 112, (7,), 1),  # 35 image tokens: padded
        (16, 256, 32, (32, 33), 2),
        (16, 16, 16, (1,), 3),
        (64, 192, 128, (70, 3), 4),
        (128, 256, 384, (31,), 5),
        (160, 320, 640, (40,), 6),
    ],
)
@torch.no_grad()
def test_equals_diffusers_body_and_plain_head(patch, height, width, lengths, seed):
    model = tiny(patch, seed)
    given = inputs(height, width, lengths, seed)
    assert error(model(*given), Reference(model)(*given)) <= 1e-5


@torch.no_grad()
def test_bf16_error_at_most_twice_the_plain_modules():
    model = tiny(16, n_layers=2)
    given = inputs(128, 96, (20, 40))
    exact = model(*given)
    model.bfloat16()
    plain = error(Reference(model, torch.bfloat16)(*given), exact)
    out = model(*given)  # pixels and t stay fp32
    assert out.dtype == torch.bfloat16 and error(out, exact) <= 2 * plain


def test_rope_equals_the_integer_tables():
    dims, lens = (32, 48, 48), (1024, 512, 512)
    ids = torch.stack([torch.arange(0, 1024, 2), torch.arange(512), torch.arange(512).flip(0)], dim=1)
    table = RopeEmbedder(256.0, dims, lens)(ids)
    cos, sin = rope_tables(ids.double(), dims, 256.0)
    assert cos.shape == (512, 1, 64)
    torch.testing.assert_close(torch.complex(cos, sin)[:, 0], table, rtol=0, atol=1e-7)


# --- Keys and shapes -------------------------------------------------------------------------------------------------
# name: (patch, tensors, parameters, sha256 of the sorted "key shape" lines)
PUBLISHED = {
    "1k": (16, 545, 6_166_464_515, "6cf000e67372ca38b5b245f1b76f390f093bbf5560447e9fd8899c143eed619b"),
    "4k": (64, 557, 6_210_711_491, "96f21d41351135aa0016d661b4052ade74da1f1cd5cf0723785be69db8c3fa67"),
    "8k": (128, 563, 6_352_274_407, "875e5e07fcfc503be805c6a54a84f96073543b1c2f6e7abd8f158288c86700b0"),
    "10k": (160, 557, 6_453_001_959, "7e975edde90db83e53a78cf26e4e28cfa38fc5b420c3fd2a32b6a5ae7a24a489"),
}


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return {name: L2PTransformer2DModel(all_patch_size=(row[0],)).state_dict() for name, row in PUBLISHED.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_and_shapes(published, name):
    patch, tensors, parameters, digest = PUBLISHED[name]
    shapes = {key: list(value.shape) for key, value in published[name].items()}
    assert shapes[f"all_x_embedder.{patch}-1.weight"] == [3840, 3 * patch * patch]
    assert shapes["layers.29.attention.to_out.0.weight"] == [3840, 3840]
    assert shapes["context_refiner.1.feed_forward.w2.weight"] == [3840, 10240]
    assert "context_refiner.0.adaLN_modulation.0.weight" not in shapes
    assert shapes["noise_refiner.0.adaLN_modulation.0.weight"] == [15360, 256]
    assert len(shapes) == tensors
    assert sum(value.numel() for value in published[name].values()) == parameters
    lines = "\n".join(sorted(f"{key} {shape}" for key, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


@pytest.mark.parametrize("name", PUBLISHED)
def test_manifests(published, name):
    assert {key: list(value.shape) for key, value in published[name].items()} == goldens.published_shapes(name)


# --- Batches and hoisting --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rope_grid", [None, 6])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(rope_grid):
    model = tiny(rope_grid=rope_grid)
    pixels, t, caps = inputs(80, 112, (5, 70, 33))
    together = model(pixels, t, caps)
    for i in range(3):
        alone = model(pixels[i : i + 1], t[i : i + 1], caps[i : i + 1])
        assert error(together[i : i + 1], alone) <= SAME
    caps[1] = 50 * torch.randn(96, 24)
    assert error(model(pixels, t, caps)[[0, 2]], together[[0, 2]]) <= SAME


@torch.no_grad()
def test_lengths_only_where_needed():
    model = tiny()
    features = [torch.zeros(n, 24) for n in (3, 32, 33)]
    assert model.prepare(features[:2], 80, 112).keys == (None, None)  # both fill 32 tokens
    cond = model.prepare(features, 80, 112)
    assert cond.keys.rows.lengths == (96, 96, 128) and cond.keys.bias is None
    assert cond.keys.rows.ends.tolist() == [0, 96, 192, 320]
    assert cond.text.shape == (3, 64, 64)


@torch.no_grad()
def test_hoisted_equals_plain():
    model = tiny()
    pixels, t, caps = inputs(80, 112, (5, 40))
    times = torch.tensor([0.0, 0.3, 0.8])
    cond = model.prepare(caps, 80, 112, timesteps=times)
    for i, time in enumerate(times):
        plain = model(pixels, time.expand(2), caps)
        assert error(model(pixels, cond=cond, step=i), plain) <= SAME
        assert error(model(pixels, time.expand(2), cond=cond), plain) <= SAME
    assert error(model(pixels, t, cond=model.prepare(caps, 80, 112)), model(pixels, t, caps)) <= SAME


# --- rope_grid -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_rope_grid_is_the_identity_on_its_own_grid():
    given = inputs(128, 128, (5, 40))
    assert torch.equal(tiny(rope_grid=8)(*given), tiny()(*given))


@torch.no_grad()
def test_rope_grid_stays_in_the_trained_range_and_centred():
    model = tiny(rope_grid=8)
    for grid in ((4, 4), (16, 16), (9, 3), (5, 40)):
        positions = model._image_positions(grid, 32)[: grid[0] * grid[1]]
        assert (positions[:, 0] == 33).all()
        for axis in (1, 2):
            assert positions[:, axis].min() > -0.5 and positions[:, axis].max() < 7.5
            assert abs(positions[:, axis].mean() - 3.5) < 1e-9


@torch.no_grad()
def test_rope_grid_makes_a_finer_grid_behave_like_the_trained_one():
    pixels, t, caps = inputs(128, 128, (20,))
    cells = pixels.unflatten(3, (8, 16)).unflatten(2, (8, 16))  # every patch four times: 16 x 16 tokens
    fine = cells.repeat_interleave(2, 2).repeat_interleave(2, 4).flatten(4, 5).flatten(2, 3)
    assert fine.shape == (1, 3, 256, 256)
    apart = {}
    for grid in (8, None):
        model = tiny(rope_grid=grid, n_layers=4)
        coarse = model.features(pixels, t, caps).repeat_interleave(2, 2).repeat_interleave(2, 3)
        apart[grid] = error(model.features(fine, t, caps), coarse)
    assert apart[8] < 0.1 and apart[8] < 0.5 * apart[None]


# --- What diffusers offers -------------------------------------------------------------------------------------------
@torch.no_grad()
def test_save_and_load(tmp_path):
    model = tiny(64, rope_grid=4)
    given = inputs(128, 64, (5,))
    model.save_pretrained(tmp_path)
    again = L2PTransformer2DModel.from_pretrained(tmp_path)
    assert again.config.rope_grid == 4 and again.patch_size == 64 and again.size_multiple == 64
    assert error(again(*given), model(*given)) <= SAME
    assert L2PTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_from_single_file(tmp_path):
    model = tiny()
    save_single_file(model, tmp_path / "m.safetensors")
    again = L2PTransformer2DModel.from_single_file(tmp_path / "m.safetensors", torch_dtype=torch.float32, rope_grid=4)
    assert again.config.rope_grid == 4 and not again.training
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny().train()
    pixels, t, caps = inputs(80, 48, (5, 40))

    def gradients():
        out = model(pixels, t, caps)
        return torch.autograd.grad(out.square().mean(), list(model.parameters()))

    plain = gradients()
    model.enable_gradient_checkpointing()
    blocks, run = [], model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda block, *args: blocks.append(block) or run(block, *args)
    for got, want in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    assert len(blocks) == 4  # each refiner's and both layers


def test_training_under_autocast():
    model = tiny().train()
    pixels, t, caps = inputs(48, 64, (5, 40))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pixels, t, caps)
    assert error(out, model(pixels, t, caps)) < 0.05
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny()
    given = inputs(48, 64, (5,))
    with torch.no_grad():
        plain = model(*given)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        adapted = model(*given)
        assert error(adapted, plain) > 1e-3
        model.disable_adapters()
        assert torch.equal(model(*given), plain)
        model.enable_adapters()
        assert torch.equal(model(*given), adapted)
    assert any("to_out.0.lora_A" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_attention_backends():
    model = tiny()
    given = inputs(48, 64, (5, 40))
    plain = model(*given)
    assert len(model.attn_processors) == 4
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        model.set_attention_backend("_native_math")
        assert {p._attention_backend.value for p in model.attn_processors.values()} == {"_native_math"}
        assert error(model(*given), plain) <= 1e-5
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(active)  # diffusers leaves the last one active for the process
    assert error(model(*given), plain) <= SAME


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers quantizes with bitsandbytes on a GPU only")
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_quantization_config(tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from diffusers import BitsAndBytesConfig

    model = tiny().to("cuda", torch.bfloat16)
    model.save_pretrained(tmp_path)
    skip = L2PTransformer2DModel.quantization_skip_modules
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skip)
    small = L2PTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16)
    small.to("cuda")
    assert type(small.layers[0].attention.to_q) is not torch.nn.Linear
    assert type(small.t_embedder.mlp[0]) is torch.nn.Linear
    pixels, t, caps = inputs(48, 64, (5,))
    given = pixels.cuda(), t.cuda(), [c.cuda() for c in caps]
    assert error(small(*given), model(*given)) < 0.3


@torch.no_grad()
def test_quantized_linears_on_the_cpu():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny()
    given = inputs(48, 64, (5,))
    plain = model(*given)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):  # all of them: nothing may rely on a weight's own dtype or shape
            linear = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None)
            linear.load_state_dict(module.state_dict())
            model.set_submodule(name, linear.to("cpu"))
    assert model.layers[0].feed_forward.w1.weight.dtype == torch.uint8
    assert error(model(*given), plain) < 0.5


# --- Mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config,message",
    [
        (dict(all_patch_size=(32,)), r"one of \[16, 64, 128, 160\], got \[32\]"),
        (dict(all_patch_size=(16, 64)), "one of"),
        (dict(in_channels=16), "in_channels 3"),
        (dict(n_kv_heads=1), "n_kv_heads must equal n_heads = 2"),
        (dict(axes_dims=(8, 12, 14)), "sum up to dim / n_heads = 32"),
    ],
)
def test_refuses_configurations(config, message):
    with pytest.raises(UserError, match=message):
        L2PTransformer2DModel(**{**BODY, **config})


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(pixels=torch.zeros(1, 3, 100, 64)), "multiples of 16 for this model, got 100 x 64; try 96 x 64"),
        (dict(pixels=torch.zeros(1, 3, 0, 64)), "try 16 x 64"),
        (dict(pixels=torch.zeros(1, 4, 64, 64)), r"pixels must be \(B, 3, H, W\), got \(1, 4, 64, 64\)"),
        (dict(pixels=torch.zeros(3, 64, 64)), "pixels must be"),
        (dict(t=torch.zeros(2)), r"t must be \(1,\), one per sample, got \(2,\)"),
        (dict(t=None), "got None"),
        (dict(cap_feats=None), "needs cap_feats"),
        (dict(cap_feats=[]), "got none"),
        (
            dict(cap_feats=[torch.zeros(4, 25)]),
            r"cap_feats\[0\] must be \(at least 1, 24\) text features, got \(4, 25\)",
        ),
        (dict(cap_feats=[torch.zeros(0, 24)]), r"got \(0, 24\)"),
        (dict(cap_feats=[torch.zeros(4, 24)] * 2), "for 2 samples of 64 x 64, pixels are 1"),
        (dict(step=0), "step must be one of the 0 timesteps"),
    ],
)
def test_refuses_inputs(change, message):
    given = dict(pixels=torch.zeros(1, 3, 64, 64), t=torch.zeros(1), cap_feats=[torch.zeros(4, 24)])
    with pytest.raises(UserError, match=message):
        tiny()(**{**given, **change})


def test_sizes_of_the_10k_model():
    model = tiny(160)
    assert model.size_multiple == 320
    with pytest.raises(UserError, match="multiples of 320 for this model, got 480 x 640; try (320|640) x 640"):
        model(torch.zeros(1, 3, 480, 640), torch.zeros(1), [torch.zeros(4, 24)])


# --- x0_floor, read_mean ---------------------------------------------------------------------------------------------


def test_head_that_predicts_the_clean_image():
    model, raw = tiny(x0_floor=0.05), tiny()
    raw.load_state_dict(model.state_dict())
    x, texts = torch.randn(2, 3, 32, 32), [torch.randn(4, model.config.cap_feat_dim)] * 2
    t = torch.tensor([0.4, 0.99])
    x0 = raw(x, t, texts)
    sigma = torch.tensor([0.6, 0.05]).view(-1, 1, 1, 1)
    torch.testing.assert_close(model(x, t, texts), (x0 - x) / sigma)
    cond = model.prepare(texts, 32, 32, timesteps=t[:1])
    with pytest.raises(UserError, match="one per sample"):
        model(x, cond=cond, step=0)


def test_read_mean_needs_a_grid_and_changes_nothing_on_it():
    with pytest.raises(UserError, match="rope_grid"):
        tiny(read_mean=1)
    model, plain = tiny(read_mean=1, rope_grid=2), tiny(rope_grid=2)
    plain.load_state_dict(model.state_dict())
    x, t, texts = torch.randn(1, 3, 32, 32), torch.tensor([0.3]), [torch.randn(4, model.config.cap_feat_dim)]
    torch.testing.assert_close(model(x, t, texts), plain(x, t, texts))


@pytest.mark.parametrize("size", [(64, 64), (128, 64)])
def test_read_mean_reads_a_large_image_as_the_small_one(size):
    model = tiny(read_mean=1, rope_grid=2)
    texts, sigma = [torch.randn(4, model.config.cap_feat_dim)], 0.8
    height, width = size[0] * 32 // max(size), size[1] * 32 // max(size)
    gain = max(size) // 32
    k = 1 - sigma + sigma / gain
    small = torch.randn(1, 3, height, width)
    large = (k * small).repeat_interleave(gain, 2).repeat_interleave(gain, 3)
    wanted = model.features(small, torch.tensor([1 - sigma / gain / k]), texts)
    t = torch.tensor([1 - sigma])
    found = model.features(large, t, texts)
    assert found.shape[-2:] == (size[0] // 16, size[1] // 16)
    wanted = torch.nn.functional.interpolate(wanted, found.shape[-2:], mode="bilinear")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    cond = model.prepare(texts, *size, timesteps=t)
    torch.testing.assert_close(model.features(large, t, cond=cond, step=0), found, atol=1e-5, rtol=1e-5)
