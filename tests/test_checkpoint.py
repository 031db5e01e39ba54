"""Reading every layout of an L2P checkpoint: names, dtypes, quantization, shards, folders, LoRAs, memory."""

import json
import subprocess
import sys
import textwrap

import goldens
import pytest
import torch
from safetensors.torch import load_file, save_file

from l2p_fast.errors import UserError
from l2p_fast.formats import values
from l2p_fast.formats.checkpoint import Checkpoint, load_state
from l2p_fast.formats.decode import hadamard
from l2p_fast.formats.names import LAYOUTS
from l2p_fast.formats.shapes import infer_config, model_shapes
from l2p_fast.formats.write import save_single_file
from l2p_fast.loading import load_model
from l2p_fast.models.zimage import L2PTransformer2DModel

TINY = {
    "dim": 64, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48,
    "axes_dims": (8, 12, 12), "head_width": 0.125,
}  # fmt: skip


def tiny(patch=16, seed=0, **config):
    torch.manual_seed(seed)
    return L2PTransformer2DModel(all_patch_size=(patch,), **TINY | config).eval()


def state_of(model, dtype=torch.bfloat16):
    return {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}


def comfy(state, prefix=""):
    """ComfyUI's layout, written out by hand: the independent other side of the table."""
    out = {}
    for key, value in state.items():
        name = key.replace("norm_q", "q_norm").replace("norm_k", "k_norm").replace("to_out.0", "out")
        if "all_x_embedder" in name:
            name = "x_embedder." + name.rpartition(".")[2]
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [state[key.replace("to_q", f"to_{x}")] for x in "qkv"]
            name, value = name.replace("to_q", "qkv"), torch.cat(parts)
        out[prefix + name] = value
    return out


def assert_holds(model, state):
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(ours[key], value.to(ours[key].dtype)), key


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
@pytest.mark.parametrize("width", [1.0, 0.125, 0.3])
def test_configuration_from_shapes_alone(patch, width):
    with torch.device("meta"):
        model = L2PTransformer2DModel(all_patch_size=(patch,), **TINY | {"head_width": width})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = infer_config(shapes)
    assert {k: model.config[k] for k in found if k != "head_width"} == {
        k: v for k, v in found.items() if k != "head_width"
    }
    assert model_shapes(found) == shapes


@pytest.mark.parametrize("size", ["1k", "4k", "8k", "10k"])
def test_published_manifest(size):
    shapes = {key: tuple(shape) for key, shape in goldens.published_shapes(size).items()}
    found = infer_config(shapes)
    assert (found["dim"], found["n_layers"], found["n_heads"], found["cap_feat_dim"]) == (3840, 30, 30, 2560)
    assert found["axes_dims"] == (32, 48, 48) and found["head_width"] == 1.0
    assert model_shapes(found) == shapes


@pytest.mark.parametrize("patch", [16, 64, 160])
def test_golden_files_load_from_shapes_alone(tmp_path, patch):
    config, weights, *_ = goldens.golden(patch)
    save_file(weights, tmp_path / "model.safetensors")
    model = L2PTransformer2DModel.from_single_file(tmp_path / "model.safetensors", torch_dtype=torch.float32)
    for key, value in config.items():
        assert key == "axes_lens" or list(torch.tensor(model.config[key]).flatten()) == list(
            torch.tensor(value).flatten()
        )
    assert_holds(model, weights)


def test_published_1k_file_mixes_f32_and_bf16(tmp_path):
    state = state_of(tiny())
    mixed = {key: value.float() if key.startswith("layers.1.") else value for key, value in state.items()}
    save_file(mixed, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert_holds(model, state)
    assert {p.dtype for p in load_model(tmp_path / "m.safetensors", torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_follows_the_file(tmp_path, dtype):
    save_file(state_of(tiny(), dtype), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").dtype == dtype


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
@pytest.mark.parametrize("patch", [16, 64])
def test_comfyui_layout(tmp_path, prefix, patch):
    state = state_of(tiny(patch))
    other = {"vae.decoder.weight": torch.zeros(3)} if prefix.startswith("model.") else {}
    save_file(comfy(state, prefix) | other, tmp_path / "m.safetensors")
    assert_holds(load_model(tmp_path / "m.safetensors"), state)


@pytest.mark.parametrize("form", ["int8_tensorwise", "float8_e4m3fn"])
@pytest.mark.parametrize("per_row", [False, True])
def test_quantized_file_is_dequantized(tmp_path, form, per_row):
    state = state_of(tiny())
    file, wanted = comfy(state, "model.diffusion_model."), {}
    for name in list(file):
        if not name.endswith(("qkv.weight", "w1.weight", "w2.weight")):
            continue
        weight = file[name].float()
        top = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().max()
        scale = top / (127 if form[0] == "i" else 448)
        stored = (weight / scale).round().to(torch.int8) if form[0] == "i" else (weight / scale).to(torch.float8_e4m3fn)
        file[name], wanted[name] = stored, stored.float() * scale
        file[name + "_scale"] = scale
        note = json.dumps({"format": form, "full_precision_matrix_mult": True}).encode()
        file[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(note), dtype=torch.uint8)
    save_file(file, tmp_path / "m.safetensors")
    dequantized = comfy(state, "model.diffusion_model.") | wanted
    assert load_model(tmp_path / "m.safetensors").dtype == torch.bfloat16
    got = comfy(load_model(tmp_path / "m.safetensors", torch.float32).state_dict(), "model.diffusion_model.")
    for name, value in dequantized.items():
        torch.testing.assert_close(got[name], value.float(), rtol=1e-6, atol=0)


def test_float8_without_a_scale_and_one_row(tmp_path):
    state = state_of(tiny())
    key = "layers.0.feed_forward.w1.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "m.safetensors")
    assert torch.equal(Checkpoint(tmp_path / "m.safetensors").tensor(key, torch.float32), state[key].float())


# As ComfyUI-INT8-Fast and convert_to_quant write them, and older files.
NOTES = {
    "per_row": {"format": "int8_tensorwise", "per_row": True},
    "scale_dtype": {"format": "int8_tensorwise", "per_row": True, "scale_dtype": "torch.float32", "orig_dtype": "bf16"},
    "no format": {"per_row": True},
    "no format, rotated": {"convrot": True, "convrot_groupsize": 16, "per_row": True},
    "empty": {},
}


@pytest.mark.parametrize("case", NOTES)
@pytest.mark.parametrize("place", ["tensor", "metadata"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_int8_files_of_other_tools(tmp_path, case, place, scale_dtype):
    state, key = state_of(tiny(), torch.float32), "layers.0.feed_forward.w1.weight"
    note = NOTES[case]
    weight = state[key]
    if note.get("convrot"):
        weight = (weight.unflatten(1, (-1, 16)) @ hadamard(16)).flatten(1)
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(scale_dtype)
    base = "model.diffusion_model." + key.removesuffix("weight")
    file = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    file[base + "weight"] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    file[base + "weight_scale"] = scale
    metadata = None
    if place == "tensor":
        file[base + "comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {base.removesuffix("."): note}})}
    save_file(file, tmp_path / "m.safetensors", metadata)
    got = load_model(tmp_path / "m.safetensors", torch.float32).state_dict()[key]
    assert (got - state[key]).norm() / state[key].norm() < 0.01


def test_rotated_int8_is_rotated_back(tmp_path):
    state = state_of(tiny(), torch.float32)
    key, size = "layers.0.attention.to_q.weight", 16
    seed = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1.0]]) / 2
    rotated = (state[key].unflatten(1, (-1, size)) @ torch.kron(seed, seed).T).flatten(1)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    note = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}).encode()
    base = key.removesuffix("weight")
    file = state | {
        key: (rotated / scale).round().to(torch.int8),
        base + "weight_scale": scale,
        base + "comfy_quant": torch.tensor(list(note), dtype=torch.uint8),
    }
    save_file(file, tmp_path / "m.safetensors")
    got = Checkpoint(tmp_path / "m.safetensors").tensor(key, torch.float32)
    assert (got - state[key]).norm() / state[key].norm() < 0.01


def test_pieces_smaller_than_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "CHUNK", 1000)
    state = state_of(tiny())
    file = comfy(state)
    name = "layers.2.attention.qkv.weight"
    scale = torch.rand(192, 1) + 0.5
    file[name] = torch.randint(-128, 127, (192, 64), dtype=torch.int8)
    file[name + "_scale"] = scale
    save_file(file, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors", torch.float32)
    whole = file[name].float() * scale
    for i, x in enumerate("qkv"):
        assert torch.equal(model.state_dict()[f"layers.2.attention.to_{x}.weight"], whole[64 * i : 64 * (i + 1)])


def test_shards_index_and_folders(tmp_path):
    model = tiny(rope_grid=8)
    state = state_of(model, torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    folder = load_model(tmp_path / "sharded")
    assert_holds(folder, state)
    assert folder.config.rope_grid == 8  # no shape tells it: config.json does
    assert_holds(load_model(next((tmp_path / "sharded").glob("*.index.json"))), state)
    pipeline = tmp_path / "pipeline"
    model.save_pretrained(pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    assert_holds(load_model(pipeline), state)
    single = tmp_path / "single"
    single.mkdir()
    save_file(state, single / "whatever.safetensors")
    assert_holds(load_model(single), state)
    loose = tmp_path / "loose"
    loose.mkdir()
    keys = sorted(state)
    save_file({k: state[k] for k in keys[::2]}, loose / "m-00001-of-00002.safetensors")
    save_file({k: state[k] for k in keys[1::2]}, loose / "m-00002-of-00002.safetensors")
    assert_holds(load_model(loose), state)


def test_load_state_is_lazy_and_names_are_ours(tmp_path):
    state = state_of(tiny())
    save_file(comfy(state), tmp_path / "m.safetensors")
    stream = load_state(tmp_path / "m.safetensors")
    assert iter(stream) is stream
    assert all(torch.equal(value, state[key]) for key, value in stream)
    assert {key for key, _ in load_state(tmp_path / "m.safetensors")} == state.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_single_file(tmp_path, layout):
    model = tiny(rope_grid=16)
    save_single_file(model, tmp_path / "m.safetensors", layout=layout)
    loaded = load_file(tmp_path / "m.safetensors")  # the library accepts it
    wanted = comfy(state_of(model, torch.float32)) if layout == "comfyui" else state_of(model, torch.float32)
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[k], wanted[k]) for k in wanted)
    again = load_model(tmp_path / "m.safetensors")
    assert again.config.rope_grid == 16
    assert_holds(again, model.state_dict())
    save_single_file(again.state_dict(), tmp_path / "s.safetensors", dtype=torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "s.safetensors").values()} == {torch.bfloat16}


def test_nan_is_never_saved(tmp_path):
    model = tiny()
    model.x_pad_token.data[0, 3] = torch.nan
    with pytest.raises(UserError, match="x_pad_token holds NaN"):
        save_single_file(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_model_and_its_largest_tensor(tmp_path):
    """An F32 file into bfloat16: twice the model's bytes pass through, never at once."""
    config = TINY | {"dim": 640, "n_layers": 5, "n_heads": 5, "n_kv_heads": 5, "axes_dims": (32, 48, 48)}
    with torch.device("meta"):
        model = L2PTransformer2DModel(all_patch_size=(64,), **config)
    state = {key: torch.full(value.shape, 0.01) for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    numbers = [2 * value.numel() for value in state.values()]
    code = f"""
    import torch
    from l2p_fast import loading
    from l2p_fast.loading import build_empty
    torch.set_num_threads(1)
    build_empty({config | {"all_patch_size": (64,)}!r})  # warm imports
    torch.zeros(4).to(torch.bfloat16).isfinite().all()
    open("/proc/self/clear_refs", "w").write("5")
    peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    before = peak()
    loaded = loading.load_model({str(tmp_path / "m.safetensors")!r}, torch.bfloat16)
    print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    used = int(done.stdout.split()[-1])
    bound = sum(numbers) + max(numbers) + 2 * values.CHUNK  # a piece in the file's dtype, and the allocator's slack
    assert used <= bound < 2 * sum(numbers), (used, bound)
