"""GGUF files and other quantized ones that stay as they are in memory."""

import json
import random
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_gguf import KINDS, packed, values_of, write_gguf
from tiny_pipeline import FEATURES, tiny_text_encoder, tiny_tokenizer, tiny_transformer

from l2p_fast import info
from l2p_fast.errors import UserError
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.formats.decode import decode, rotate
from l2p_fast.formats.gguf import read_gguf
from l2p_fast.formats.header import PACKED
from l2p_fast.formats.names import to_layout
from l2p_fast.loading import load_loras, load_model, load_text_encoders, model_class
from l2p_fast.models.adapters import AdapterLayer, weight_of
from l2p_fast.models.pixel import empty
from l2p_fast.quantize import CodedLinear
from l2p_fast.quantize.products import probe
from l2p_fast.quantize.stored import StoredLinear

FLUX = {
    "pixel_patch_size": 16, "head_width": 0.05, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24, "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
DIM = 768  # rows of the feed-forward, 2048, and of the rest are whole blocks of 256


def large(seed=0):
    torch.manual_seed(seed)
    return tiny_transformer(dim=DIM, n_heads=24, n_kv_heads=24, axes_dims=(8, 12, 12))


@pytest.fixture(scope="module")
def state():
    return {key: value.detach().bfloat16() for key, value in large().state_dict().items()}


def as_gguf(state, prefix="", layout="comfyui"):
    """ComfyUI's names, fused; each kind of K-quant somewhere; what has one dimension in F32, as ggml has it."""
    out, kinds = {}, iter(range(10**6))
    for name, keys in to_layout(state, layout, prefix).items():
        value = torch.cat([state[key] for key in keys])
        linear = name.endswith("weight") and value.ndim == 2 and ".adaLN" not in name and "embedder" not in name
        if linear:
            kind = KINDS[next(kinds) % len(KINDS)]
            out[name] = packed(tuple(value.shape), kind, seed=len(out)), kind
        elif "pad_token" in name or value.ndim == 1:
            out[name] = value.float().flatten()  # ggml forgets the dimension of 1
        else:
            out[name] = value.half() if "adaLN" in name else value
    return out


def expected(tensors, state, layout="comfyui", prefix=""):
    """Our key -> what the gguf package reads, split as our names are."""
    wanted = {}
    for name, keys in to_layout(state, layout, prefix).items():
        parts = values_of(tensors[name]).split([len(state[key]) for key in keys]) if len(keys) > 1 else None
        for i, key in enumerate(keys):
            value = values_of(tensors[name]) if parts is None else parts[i]
            wanted[key] = value.reshape(state[key].shape)
    return wanted


@pytest.mark.parametrize("kind", PACKED)
def test_unpacking_is_that_of_the_gguf_package(kind):
    packing, theirs = PACKED[kind], gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[theirs] == (packing.values, packing.size)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 2, packing.size), dtype=np.uint8)
    halves = rng.standard_normal((3, 2, len(range(256)[packing.scales]) // 2)).astype(np.float16)
    codes[..., packing.scales] = halves.view(np.uint8)
    codes = codes.reshape(3, -1)
    assert np.array_equal(decode(torch.from_numpy(codes), kind).numpy(), gguf.quants.dequantize(codes, theirs))


@pytest.mark.parametrize(("layout", "prefix"), [("comfyui", "model.diffusion_model."), ("published", "")])
def test_a_file_is_read(tmp_path, state, layout, prefix):
    tensors = as_gguf(state, prefix, layout)
    write_gguf(tmp_path / "m.gguf", tensors, {"l2p_config": json.dumps({"rope_theta": 300.0})})
    found = Checkpoint(tmp_path)  # the folder that holds it alone
    assert found.kind() == "l2p" and found.l2p_config()["rope_theta"] == 300.0
    wanted = expected(tensors, state, layout, prefix)
    assert found.tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found.tensor(key, torch.float32), value), key
    model = load_model(tmp_path / "m.gguf", torch.float32)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_it_stays_packed_and_predicts_the_same(tmp_path, state):
    write_gguf(tmp_path / "m.gguf", as_gguf(state))
    for dtype in (torch.bfloat16, torch.float32):
        plain = load_model(tmp_path / "m.gguf", dtype)
        kept = load_model(tmp_path / "m.gguf", dtype, quantize="stored")
        layers = [module for module in kept.modules() if isinstance(module, StoredLinear)]
        assert len(layers) == 7 * 4 and {layer.kind for layer in layers} == set(KINDS)
        assert torch.equal(probe(kept), probe(plain))
        assert all(p.dtype == dtype for p in kept.parameters())
    stored = [where for where in Checkpoint(tmp_path / "m.gguf").tensors.values() if where.quantized]
    assert sum(layer.weight.nbytes for layer in layers) == sum(where.nbytes for where in stored)
    half = kept.to(torch.bfloat16)  # codes are not cast
    assert layers[0].weight.dtype == torch.uint8 and torch.equal(probe(half), probe(half))


def test_a_lora_lies_over_it(tmp_path, state):
    write_gguf(tmp_path / "m.gguf", as_gguf(state))
    torch.manual_seed(0)
    name = "layers.0.attention.to_q"
    down, up = torch.randn(4, DIM) / 30, torch.randn(DIM, 4) / 30
    pairs = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(pairs, tmp_path / "lora.safetensors")
    model = load_model(tmp_path / "m.gguf", torch.float32, quantize="stored")
    before = probe(model)
    assert load_loras(model, [(tmp_path / "lora.safetensors", 0.5)]) == [(0, 1)]
    layer = model.get_submodule(name)
    assert isinstance(layer, AdapterLayer) and isinstance(layer.base_layer, StoredLinear)
    x = torch.randn(2, DIM)
    wanted = x @ (weight_of(layer.base_layer, torch.float32) + 0.5 * up @ down).t()
    torch.testing.assert_close(layer(x), wanted)
    assert not torch.equal(probe(model), before)
    with pytest.raises(UserError, match="can't merge a LoRA into the quantized weights"):
        from l2p_fast import load_lora

        load_lora(load_model(tmp_path / "m.gguf", quantize="stored"), tmp_path / "lora.safetensors")


# --- Other quantized files -------------------------------------------------------------------------------------------
def in_8_bits(state, form, per_row, rotation=0):
    """ComfyUI's names; the layers of the feed-forward and of attention in INT8 or float8."""
    out = {}
    for name, keys in to_layout(state, "comfyui").items():
        out[name] = value = torch.cat([state[key] for key in keys])
        if value.ndim != 2 or "adaLN" in name or "embedder" in name or "pad" in name:
            continue
        value, base = value.float(), name.removesuffix("weight")
        if rotation:
            value = rotate(value, rotation)
        top = value.abs().amax(1, keepdim=True) if per_row else value.abs().max()
        scale = top / (127 if form == "int8_tensorwise" else 448)
        out[name] = (value / scale).round().to(torch.int8) if form[0] == "i" else (value / scale).to(
            torch.float8_e4m3fn
        )  # fmt: skip
        note = {"format": form} | ({"convrot": True, "convrot_groupsize": rotation} if rotation else {})
        out[base + "weight_scale"] = scale
        out[base + "comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    return out


@pytest.mark.parametrize(
    ("form", "per_row", "rotation"),
    [("int8_tensorwise", False, 0), ("int8_tensorwise", True, 0), ("int8_tensorwise", True, 256),
     ("float8_e4m3fn", False, 0)],
)  # fmt: skip
def test_8_bits_stay_8_bits(tmp_path, state, form, per_row, rotation):
    save_file(in_8_bits(state, form, per_row, rotation), tmp_path / "m.safetensors")
    plain = load_model(tmp_path / "m.safetensors", torch.bfloat16)
    kept = load_model(tmp_path / "m.safetensors", torch.bfloat16, quantize="stored")
    layers = [module for module in kept.modules() if isinstance(module, StoredLinear)]
    assert len(layers) == 28 and {layer.weight.element_size() for layer in layers} == {1}
    assert {layer.weight_scale.numel() for layer in layers} <= ({DIM, 2048} if per_row else {1})
    for name, layer in kept.named_modules():
        if isinstance(layer, StoredLinear):
            assert torch.equal(layer.weight_in(torch.bfloat16), plain.get_submodule(name).weight), name
    assert torch.equal(probe(kept), probe(plain))


@pytest.mark.parametrize("leaf", ["weight.quant_state.bitsandbytes__nf4", "SCB"])
def test_bitsandbytes_is_refused_by_name(tmp_path, state, leaf):
    save_file(state | {f"layers.0.attention.to_q.{leaf}": torch.zeros(4)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="quantized by bitsandbytes, which is not read"):
        load_model(tmp_path / "m.safetensors")


def test_layers_with_a_bias_stay_too(tmp_path):
    torch.manual_seed(0)
    model = empty(model_class("flux"), FLUX).to_empty(device="cpu")
    tensors = {key: torch.randn(value.shape) / 8 for key, value in model.state_dict().items()}
    blocks = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()
              if "blocks" in key and value.ndim == 2}  # fmt: skip
    save_file(tensors | blocks, tmp_path / "m.safetensors")
    kept = load_model(tmp_path / "m.safetensors", torch.float32, quantize="stored")
    layers = [module for module in kept.modules() if isinstance(module, StoredLinear)]
    assert len(layers) == len(blocks) and all(layer.bias is not None for layer in layers)
    assert torch.equal(probe(kept), probe(load_model(tmp_path / "m.safetensors", torch.float32)))


def test_a_text_encoder_in_fewer_bits(tmp_path):
    tiny_text_encoder().save_pretrained(tmp_path / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    ids = torch.arange(20)[None]
    ((plain, _),) = load_text_encoders(tmp_path, "zimage", torch.float32)
    ((rounded, _),) = load_text_encoders(tmp_path, "zimage", torch.float32, quantize="int8")
    wanted, got = (encoder(ids).last_hidden_state for encoder in (plain, rounded))
    layers = [module for module in rounded.modules() if isinstance(module, CodedLinear)]
    assert len(layers) == 3 * 7 and got.shape[-1] == FEATURES
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    path = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {
        key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in plain.state_dict().items()
    }
    save_file(tensors, path)
    ((kept, _),) = load_text_encoders(tmp_path, "zimage", torch.float32, quantize="stored")
    ((full, _),) = load_text_encoders(tmp_path, "zimage", torch.float32)
    assert sum(isinstance(module, StoredLinear) for module in kept.modules()) == 3 * 7
    assert torch.equal(kept(ids).last_hidden_state, full(ids).last_hidden_state)


# --- Headers ---------------------------------------------------------------------------------------------------------
def header(version=3, tensors=1, keys=0, pairs=b"", name=b"x", dims=(4,), kind=0, offset=0, body=bytes(32)):
    text = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + pairs
    text += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    text += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
    return text + bytes(-len(text) % 32) + body


def pair(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


BAD = {
    "version": (header(version=1), "is of version 1"),
    "big-endian": (header(version=3 << 24), "is big-endian"),
    "no tensors": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no tensors"),
    "billions of tensors": (header(tensors=2**40), "tensors and 0 keys"),
    "billions of keys": (header(keys=2**60), "keys"),
    "long name": (header(name=b"x" * 2000), "a name has 2,000 bytes"),
    "strange name": (header(name=b"a\0b"), "is not a name"),
    "not utf-8": (header(name=b"\xff\xfe"), "damaged header"),
    "many dimensions": (header(dims=(1,) * 9), "has 9 dimensions"),
    "huge dimensions": (header(dims=(2**63, 2**63)), "can't lie at 0"),
    "type": (header(kind=20), "is stored as GGUF's type 20; supported: Q8_0, Q6_K"),
    "integers": (header(kind=26, dims=(8,)), "truncated|longer|is not|expected") ,
    "half a block": (header(kind=8, dims=(4, 4)), r"x \[4, 4\] can't be of Q8_0"),
    "elsewhere": (header(offset=64), "can't lie at 64"),
    "truncated": (header(dims=(64,)), "is truncated"),
    "longer": (header(body=bytes(200)), "longer than its header says"),
    "key twice": (header(keys=2, pairs=2 * pair(b"k", 4, bytes(4))), "'k' is given twice"),
    "alignment": (header(keys=1, pairs=pair(b"general.alignment", 4, struct.pack("<I", 3))), "alignment is 3"),
    "alignment 0": (header(keys=1, pairs=pair(b"general.alignment", 4, bytes(4))), "alignment is 0"),
    "value's type": (header(keys=1, pairs=pair(b"k", 77, b"")), "unknown type 77"),
    "long text": (header(keys=1, pairs=pair(b"k", 8, struct.pack("<Q", 2**62))), "ends inside its header"),
    "long list": (header(keys=1, pairs=pair(b"k", 9, struct.pack("<IQ", 0, 2**62))), "ends inside its header"),
    "list of texts": (header(keys=1, pairs=pair(b"k", 9, struct.pack("<IQ", 8, 2**60))), "ends inside its header"),
    "list of lists": (header(keys=1, pairs=pair(b"k", 9, struct.pack("<IQ", 9, 1))), "a list has the type 9"),
    "cut": (header()[:30], "ends inside its header"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_hostile_headers(tmp_path, case):
    data, words = BAD[case]
    (tmp_path / "m.gguf").write_bytes(data)
    if case == "integers":
        assert read_gguf(tmp_path / "m.gguf")[0]["x"].dtype == "I32"
        return
    with pytest.raises(UserError, match=words):
        read_gguf(tmp_path / "m.gguf")


def test_mutated_files(tmp_path):
    """Seeded flips and cuts: read, or refused in one line."""
    tensors = {"x_pad_token": torch.zeros(8), "a.weight": (packed((4, 64), "Q8_0"), "Q8_0"), "b": torch.ones(2, 3)}
    write_gguf(tmp_path / "good.gguf", tensors, {"general.name": "a name"})
    good, path, refused = (tmp_path / "good.gguf").read_bytes(), tmp_path / "m.gguf", 0
    assert read_gguf(tmp_path / "good.gguf")[0]["x_pad_token"].shape == (1, 8)
    for seed in range(300):
        rng, data = random.Random(seed), bytearray(good)
        if seed % 3 == 0:
            data = data[: rng.randrange(4, len(data))]
        else:
            for _ in range(rng.choice([1, 1, 4])):
                data[rng.randrange(4, 400)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            for key in (found := Checkpoint(path)).tensors:
                found.tensor(key)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and 10 < len(str(error)) < 800
    assert 100 < refused < 300


def test_scales_that_are_not_finite(tmp_path, state):
    tensors = as_gguf(state)
    name = "layers.0.feed_forward.w1.weight"
    tensors[name][0][0, PACKED[tensors[name][1]].scales] = 0xFF
    write_gguf(tmp_path / "m.gguf", tensors)
    for quantize in (None, "stored"):
        with pytest.raises(UserError, match=f"{name} holds NaN or infinite values"):
            load_model(tmp_path / "m.gguf", quantize=quantize)


def test_info_tells_of_a_file(tmp_path, state, capsys):
    write_gguf(tmp_path / "m.gguf", as_gguf(state), {"general.name": "a" * 500})
    info.main([str(tmp_path / "m.gguf")])
    said = capsys.readouterr().out
    assert "L2P model of Z-Image" in said and "all_patch_size (16,)" in said and f"dim {DIM}" in said
    assert all(kind in said for kind in (*KINDS, "BF16", "F16", "F32"))
    assert "'general.architecture': 'lumina2'" in said and "a" * 201 not in said


def test_without_the_gguf_package(tmp_path, state, monkeypatch):
    from l2p_fast.formats import decode as module

    write_gguf(tmp_path / "m.gguf", as_gguf(state))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    module.functions.cache_clear()
    with pytest.raises(UserError, match=r"pip install l2p_fast\[gguf\]"):
        load_model(tmp_path / "m.gguf")
    monkeypatch.undo()
    module.functions.cache_clear()
    load_model(tmp_path / "m.gguf")
