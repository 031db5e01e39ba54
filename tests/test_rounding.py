"""`convert export --quantize`: what is written is read back, by us, by safetensors and by the gguf package."""

import json

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoint import comfy
from tiny_pipeline import save_tiny, tiny_transformer

from l2p_fast.convert import main
from l2p_fast.errors import UserError
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.formats.decode import decode
from l2p_fast.formats.quantized import EXPORTS
from l2p_fast.loading import load_model
from l2p_fast.quantize.export import pack_q4_k, pack_q8_0
from l2p_fast.quantize.products import probe
from l2p_fast.quantize.stored import StoredLinear
from l2p_fast.sampling.rounding import prediction

SIZES = {"dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": (8, 12, 12)}  # of the inside of the feed-forward: 682
ERROR = {"int8-convrot": 0.01, "fp8": 0.04, "q8_0": 0.01, "q4_k": 0.1}  # of weights that are spread evenly


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sizes of all kinds: rows of 256, of 32 alone (160) and of neither (the inside of the feed-forward)."""
    path = tmp_path_factory.mktemp("source") / "m.safetensors"
    model = tiny_transformer(**SIZES, norm_eps=1e-4)
    save_file({key: value.bfloat16() for key, value in model.state_dict().items()}, path,
              {"l2p_config": json.dumps({"norm_eps": 1e-4})})  # fmt: skip
    return path


def export(source, form, out, *more):
    assert main(["export", str(source), "--quantize", form, "--out", str(out), *map(str, more)]) == 0
    return out


@pytest.mark.parametrize("form", EXPORTS)
def test_what_is_written_is_read_back(tmp_path, source, form, capsys):
    out = export(source, form, tmp_path / f"m{EXPORTS[form]}", "--prefix", "model.diffusion_model.")
    said = capsys.readouterr().out
    assert f"blocks in {form}" in said
    found, state = Checkpoint(out), load_file(source)
    assert found.l2p_config() == Checkpoint(source).l2p_config() and found.config["norm_eps"] == 1e-4
    rounded = {key for key, where in found.tensors.items() if where.quantized}
    assert rounded and all(key.startswith(("layers.", "noise_refiner.", "context_refiner.")) for key in rounded)
    assert not any("adaLN" in key or "norm" in key for key in rounded)
    for key, value in state.items():
        got = found.tensor(key, torch.float32)
        if key in rounded:
            assert 0 < (got - value.float()).norm() / value.float().norm() < ERROR[form], key
        else:
            assert torch.equal(got, value.float()), key
    kept = load_model(out, quantize="stored")
    assert {f"{name}.weight" for name, m in kept.named_modules() if isinstance(m, StoredLinear)} == rounded
    wanted = probe(load_model(source, torch.float32))
    error = (probe(load_model(out, torch.float32)) - wanted).norm() / wanted.norm()
    assert float(said.split("one prediction is ")[1].split("%")[0]) / 100 == pytest.approx(
        float(error), rel=0.1, abs=2e-6
    )


def test_comfyui_finds_its_names(tmp_path, source):
    file = load_file(export(source, "int8-convrot", tmp_path / "m.safetensors"))
    names = {name for name in comfy(load_file(source))}
    assert {name for name in file if not name.endswith((".weight_scale", ".comfy_quant"))} == names
    qkv = "layers.0.attention.qkv."
    assert file[qkv + "weight"].dtype == torch.int8 and file[qkv + "weight"].shape == (768, 256)
    assert file[qkv + "weight_scale"].shape == (768, 1) and file[qkv + "weight_scale"].dtype == torch.float32
    note = json.loads(bytes(file[qkv + "comfy_quant"].tolist()))
    assert note == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    file = load_file(export(source, "fp8", tmp_path / "f.safetensors"))
    assert file[qkv + "weight"].dtype == torch.float8_e4m3fn and file[qkv + "weight_scale"].shape == ()
    assert json.loads(bytes(file[qkv + "comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
    assert file["local_decoder.out_conv.weight"].dtype == file["x_embedder.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["q8_0", "q4_k"])
def test_the_gguf_package_reads_it(tmp_path, source, form):
    out = export(source, form, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(out)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == set(comfy(load_file(source)))
    assert reader.get_field("general.architecture").contents() == "lumina2"
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["layers.0.attention.qkv.weight"] == form.upper() and kinds["layers.0.ffn_norm1.weight"] == "F32"
    assert kinds["layers.0.feed_forward.w2.weight"] == "BF16"  # 682 columns are no blocks
    ours, found = load_model(out, torch.float32).state_dict(), tensors["layers.0.attention.qkv.weight"]
    assert list(found.shape) == [256, 768]
    theirs = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
    assert torch.equal(theirs, torch.cat([ours[f"layers.0.attention.to_{x}.weight"] for x in "qkv"]))


def test_packing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 512, generator=generator) * 0.02
    for pack, kind, least in ((pack_q8_0, "Q8_0", 0.006), (pack_q4_k, "Q4_K", 0.075)):
        assert (decode(pack(x), kind) - x).norm() / x.norm() < least
    for case in (torch.zeros(1, 256), torch.full((1, 256), 3.0), torch.full((1, 256), -3.0), x[:1, :256].abs()):
        for scale in (1.0, 100.0):
            got = decode(pack_q4_k(case * scale), "Q4_K")
            assert (got - case * scale).abs().max() <= 0.05 * scale * case.abs().max()
    x[0, 0] = 100.0  # one value far out costs its own group alone
    assert (decode(pack_q4_k(x), "Q4_K") - x)[:, 256:].norm() / x[:, 256:].norm() < 0.1


def test_a_prediction_reads_weights_as_it_goes(source):
    assert torch.equal(prediction(Checkpoint(source)), probe(load_model(source, torch.float32)))


def test_a_sheet(tmp_path, capsys):
    folder = save_tiny(tmp_path / "pipe", transformer=tiny_transformer(**SIZES), default_steps=2)
    export(folder, "q4_k", tmp_path / "m.gguf", "--sheet", tmp_path / "s.png", "--prompt", "a", "--prompt", "b",
           "--res", 32)  # fmt: skip
    said = capsys.readouterr().out
    assert "of 255 off: a" in said and "of 255 off: b" in said
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (64, 64)
        left, right = (np.asarray(sheet.crop((x, 0, x + 32, 64)), dtype=float) for x in (0, 32))
    assert np.abs(left - right).mean() < 1  # the folder's two steps, for the file too


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "q4_k", "--out", "m.safetensors"], "--out must end in .gguf"),
        (["--quantize", "fp8", "--out", "m.gguf"], "--out must end in .safetensors"),
        (["--quantize", "fp8", "--layout", "published", "--out", "m.safetensors"], "is written in --layout comfyui"),
        (["--sheet", "s.png", "--out", "m.safetensors"], "give both"),
        (["--prompt", "a", "--out", "m.safetensors"], "go with --sheet"),
        (["--quantize", "fp8", "--sheet", "s.jpg", "--prompt", "a", "--out", "m.safetensors"], "must end in .png"),
        (["--quantize", "fp8", "--sheet", "s.png", "--prompt", "a", "--out", "m.safetensors"], "--text-encoder FOLDER"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, monkeypatch, source, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        main(["export", str(source), *arguments])
    assert not list(tmp_path.iterdir())


def test_sizes_that_fit_nothing(tmp_path):
    model = tiny_transformer(dim=40, n_heads=1, n_kv_heads=1, axes_dims=(8, 16, 16))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="no weight has rows that q4_k takes"):
        main(["export", str(tmp_path / "m.safetensors"), "--quantize", "q4_k", "--out", str(tmp_path / "o.gguf")])
    assert not (tmp_path / "o.gguf").exists()
