"""Loading: quantized on the way, little memory, text encoders and pipeline folders that are whole and only data."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import TINY
from tiny_pipeline import TEMPLATE, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer, wide_transformer

from l2p_fast.errors import UserError, run_cli
from l2p_fast.formats.shapes import model_shapes
from l2p_fast.formats.write import save_single_file
from l2p_fast.loading import load_model, load_text_encoder
from l2p_fast.models.text import encode_prompts
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.quantize import LowBitLinear, quantize, weight_error
from l2p_fast.sampling.pipeline import load_pipeline


# --- Quantized on the way --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["int8", "fp8", "nf4"])
def test_quantized_while_loading_is_quantized_in_place(tmp_path, name):
    whole = wide_transformer().to(torch.bfloat16)
    save_single_file(whole, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", torch.bfloat16, quantize=name)
    quantize(whole, name)
    ours, theirs = loaded.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == value.dtype and torch.equal(ours[key], value) for key, value in theirs.items())
    assert weight_error(loaded) == weight_error(whole) > 0
    assert weight_error(loaded) < {"int8": 0.01, "fp8": 0.05, "nf4": 0.1}[name]
    assert weight_error(tiny_transformer()) is None


def test_8_bits_move_with_the_model_and_are_never_cast(tmp_path):
    model = tiny_transformer()
    quantize(model, "fp8")
    layer = next(module for module in model.modules() if isinstance(module, LowBitLinear))
    before = layer.weight.clone(), layer.weight_scale.clone()
    torch.nn.Module.to(model, torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight.float(), before[0].float()) and torch.equal(layer.weight_scale, before[1])
    torch.nn.Module.to(model, "meta")
    assert layer.weight.is_meta and layer.weight.dtype == torch.float8_e4m3fn


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_while_quantizing(tmp_path):
    """The bf16 model is nowhere whole: its blocks' bytes are never all there at 16 bits."""
    config = TINY | {"dim": 768, "n_layers": 4, "n_heads": 6, "n_kv_heads": 6, "axes_dims": (32, 48, 48)}
    with torch.device("meta"):
        model = L2PTransformer2DModel(all_patch_size=(16,), **config)
    state = {key: torch.full(value.shape, 0.01, dtype=torch.bfloat16) for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    code = f"""
    import torch
    from l2p_fast import loading
    from l2p_fast.formats import values
    torch.set_num_threads(1)
    values.CHUNK = 1 << 20
    from l2p_fast.loading import build_empty
    from l2p_fast.quantize import products
    build_empty({config | {"all_patch_size": (16,)}!r})  # warm imports
    products.quantize_block(torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False).bfloat16()), "int8")
    open("/proc/self/clear_refs", "w").write("5")
    peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    before = peak()
    loaded = loading.load_model({str(tmp_path / "m.safetensors")!r}, torch.bfloat16, quantize="int8")
    print(peak() - before, sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers())))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    used, kept = map(int, done.stdout.split()[-2:])
    pieces = 12 << 20  # a piece of the file, its rows in fp32 while they are rounded, and the allocator's slack
    assert used <= kept + pieces, (used, kept)
    assert kept + 2 * pieces < sum(value.nbytes for value in state.values())


# --- Text encoders ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    for file in whole.rglob("*"):
        place = tmp_path / "text" / file.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            place.write_bytes(file.read_bytes())
    return tmp_path / "text"


def test_text_encoder(whole):
    encoder, tokenizer = load_text_encoder(whole)
    wanted = encode_prompts(tiny_text_encoder(), tiny_tokenizer(), ["a red circle", ""])
    for ours, theirs in zip(encode_prompts(encoder, tokenizer, ["a red circle", ""]), wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert not encoder.training and encoder.dtype == torch.float32
    assert load_text_encoder(whole, torch.bfloat16)[0].dtype == torch.bfloat16


def test_text_encoder_as_published_and_in_8_bits(folder):
    """Names of the causal model with its own last layer, shards, INT8 with a scale."""
    state = load_file(folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder" / "model.safetensors").unlink()
    key = "layers.1.mlp.up_proj.weight"
    scale = state[key].abs().amax(1, keepdim=True) / 127
    named = {f"model.{name}": value for name, value in state.items()} | {"lm_head.weight": torch.zeros(300, 32)}
    named[f"model.{key}"] = (state[key] / scale).round().to(torch.int8)
    named[f"model.{key}_scale"] = scale
    parts = sorted(named)
    for i in range(2):
        save_file(
            {name: named[name] for name in parts[i::2]},
            folder / "text_encoder" / f"model-0000{i + 1}-of-00002.safetensors",
        )
    encoder = load_text_encoder(folder, torch.float32)[0].state_dict()
    assert encoder.keys() == state.keys()
    assert all(torch.equal(encoder[name], value) for name, value in state.items() if name != key)
    assert (encoder[key] - state[key]).norm() / state[key].norm() < 0.01


def edit(name, **changes):
    def make(folder):
        path = folder / name
        found = json.loads(path.read_text()) | {key.replace("__", "."): value for key, value in changes.items()}
        path.write_text(json.dumps({key: value for key, value in found.items() if value != "GONE"}))

    return make


def tensors(change):
    def make(folder):
        path = folder / "text_encoder" / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    return make


def cut(name, keep=0.5):
    def make(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return make


def gone(*names):
    def make(folder):
        for name in names:
            (folder / name).unlink()

    return make


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def pickled(folder):
    path = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), folder / "text_encoder" / "pytorch_model.bin")
    path.unlink()


def without(folder_name):
    def make(folder):
        for file in (folder / folder_name).iterdir():
            file.unlink()
        (folder / folder_name).rmdir()

    return make


def renamed(state):
    state["layers.0.mlp.gate.weight"] = state.pop("layers.0.mlp.gate_proj.weight")


def halved(state):
    state["layers.2.self_attn.o_proj.weight"] = state["layers.2.self_attn.o_proj.weight"][:16].clone()


def poisoned(state):
    state["norm.weight"][3] = torch.nan


WEIGHTS, CONFIG = "text_encoder/model.safetensors", "text_encoder/config.json"
TOKENS, TOKENIZER = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
ENCODERS = {
    "a tensor is missing": (tensors(lambda state: state.pop("layers.1.mlp.up_proj.weight")), "1 missing (layers.1.mlp"),
    "a tensor is renamed": (tensors(renamed), "1 missing (layers.0.mlp.gate_proj.weight); 1 unexpected"),
    "a tensor is misshapen": (tensors(halved), "[16, 32] instead of [32, 32]"),
    "a tensor is there twice": (
        tensors(lambda state: state.update({"model.norm.weight": torch.ones(32)})), "norm.weight twice",
    ),
    "NaN": (tensors(poisoned), "NaN or infinite"),
    "truncated": (cut(WEIGHTS), "truncated"),
    "no weights": (gone(WEIGHTS), "no .safetensors file"),
    "a pickle": (pickled, "only pickles"),
    "no folder text_encoder": (without("text_encoder"), "has no folder text_encoder"),
    "no config": (gone(CONFIG), "config.json is missing"),
    "config is no JSON": (cut(CONFIG), "not valid JSON"),
    "config is deep": (write(CONFIG, "[" * 100_000), "nested too deeply"),
    "config of another size": (edit(CONFIG, num_hidden_layers=2), "unexpected"),
    "config of a huge size": (edit(CONFIG, num_hidden_layers=10**9), "num_hidden_layers must be a number from 1"),
    "config of no number": (edit(CONFIG, hidden_size="32"), "hidden_size must be a number"),
    "config with NaN": (edit(CONFIG, rms_norm_eps=float("nan")), "not valid JSON"),
    "config of another model": (edit(CONFIG, model_type="llama"), "not a qwen3"),
    "config with another RoPE": (edit(CONFIG, rope_parameters={"rope_type": "yarn", "factor": 4}), "RoPE"),
    "no folder tokenizer": (without("tokenizer"), "has no folder tokenizer"),
    "no tokenizer.json": (gone(TOKENS), "lacks tokenizer.json"),
    "no tokenizer_config.json": (gone(TOKENIZER), "tokenizer_config.json is not a file"),
    "no chat template": (gone("tokenizer/chat_template.jinja"), "no chat template"),
    "a broken chat template": (write("tokenizer/chat_template.jinja", "{% for %}"), "can't load the tokenizer"),
    "tokenizer truncated": (cut(TOKENS), "not valid JSON"),
    "tokenizer of nothing": (write(TOKENS, "{}"), "can't load the tokenizer"),
    "another tokenizer": (edit(TOKENIZER, tokenizer_class="T5Tokenizer"), "not Qwen's tokenizer"),
    "a tokenizer that names a file": (edit(TOKENIZER, vocab_file="/etc/passwd"), "names files of its own"),
    "more tokens than the encoder": (edit(CONFIG, vocab_size=200), "misshapen (embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENCODERS)
def test_bad_text_encoder(folder, case, capsys):
    make, words = ENCODERS[case]
    make(folder)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: load_text_encoder(folder) and 0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert words in said and len(said) < 500


def test_a_tokenizer_of_another_encoder(folder):
    state = load_file(folder / WEIGHTS)
    state["embed_tokens.weight"] = state["embed_tokens.weight"][:200].clone()
    save_file(state, folder / WEIGHTS)
    edit(CONFIG, vocab_size=200)(folder)
    with pytest.raises(UserError, match="don't belong together"):
        load_text_encoder(folder)


def test_a_mistyped_folder_asks_no_hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("weights/z-image", str(tmp_path / "none"), "none", "../none/there", "a/b/c", "a\0/b", "a" * 300):
        with pytest.raises(UserError, match="does not exist"):
            load_text_encoder(name)


def test_a_hub_id_is_fetched_and_then_read_as_a_folder(whole, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **k: asked.append((name, k)) or str(whole))
    load_text_encoder("Some-Org/Some-Model")
    assert asked[0][0] == "Some-Org/Some-Model"
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked[0][1]["allow_patterns"])


# --- Pipeline folders ------------------------------------------------------------------------------------------------
@pytest.fixture
def pipeline(tmp_path):
    tiny_pipeline(default_steps=7, default_guidance_scale=3.5).save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def test_pipeline_folder(pipeline):
    edit("scheduler/scheduler_config.json", shift=5.0)(pipeline)
    pipe = load_pipeline(pipeline)
    assert pipe.config.default_steps == 7 and pipe.config.default_guidance_scale == 3.5
    assert pipe.scheduler.config.shift == 5.0 and pipe.tokenizer.chat_template == TEMPLATE


def test_a_folders_code_and_classes_are_never_used(pipeline, tmp_path, monkeypatch):
    """Python files, remote code and components of any class lie in the folder; nothing of it is imported or fetched."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
    evil = f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nclass Evil: pass\n"
    for place in ("", "transformer", "text_encoder", "tokenizer", "scheduler"):
        for name in ("evil.py", "pipeline.py", "modeling.py", "__init__.py"):
            (pipeline / place / name).write_text(evil)
    code = {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
    for name in (CONFIG, TOKENIZER, "transformer/config.json"):
        edit(name, auto_map=code, _attn_implementation="evil/kernels", trust_remote_code=True)(pipeline)
    edit("model_index.json", _class_name=["evil", "Evil"], transformer=["evil", "Evil"], text_encoder=["os", "system"])(
        pipeline
    )
    load_pipeline(pipeline)
    edit("model_index.json", scheduler=["evil", "Evil"])(pipeline)
    with pytest.raises(UserError, match="its scheduler is"):
        load_pipeline(pipeline)
    assert not (tmp_path / "ran").exists()


FOLDERS = {
    "steps beyond bounds": (edit("model_index.json", default_steps=10**20), "default_steps must be a number"),
    "steps of text": (edit("model_index.json", default_steps="7"), "default_steps must be a number"),
    "guidance of 1e308": (edit("model_index.json", default_guidance_scale=1e308), "default_guidance_scale"),
    "index no JSON": (cut("model_index.json"), "not valid JSON"),
    "shift of text": (edit("scheduler/scheduler_config.json", shift="3"), "shift must be a number"),
    "shift of a latent model": (edit("scheduler/scheduler_config.json", use_dynamic_shifting=True), "dynamic"),
    "no transformer": (without("transformer"), "does not exist"),
    "transformer truncated": (cut("transformer/diffusion_pytorch_model.safetensors"), "truncated"),
    "rope_grid of 10^30": (edit("transformer/config.json", rope_grid=10**30), "rope_grid must be a number"),
    "axes of text": (edit("transformer/config.json", axes_dims="abc"), "axes_dims must be three numbers"),
    "axes of other sizes": (edit("transformer/config.json", axes_dims=[2, 2, 2]), "axes_dims must"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_pipeline_folder(pipeline, case, capsys):
    make, words = FOLDERS[case]
    make(pipeline)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: load_pipeline(pipeline) and 0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert words in said and len(said) < 500


# --- Arithmetic ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("patch", [16, 64, 128, 160])
@pytest.mark.parametrize("width", [1.0, 0.125, 0.3])
@pytest.mark.parametrize("dim", [64, 3840])
def test_shapes_by_arithmetic_are_the_models(patch, width, dim):
    heads = 2 if dim == 64 else 30
    sizes = {"dim": dim, "n_heads": heads, "n_kv_heads": heads, "head_width": width, "n_layers": 2}
    sizes["axes_dims"] = (dim // heads // 4, dim // heads // 8 * 3, dim // heads // 8 * 3)
    with torch.device("meta"):
        model = L2PTransformer2DModel(all_patch_size=(patch,), **sizes)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert model_shapes(dict(model.config)) == wanted
