"""LoRA files of every trainer: names, strength, what is skipped and refused, merging into plain and 8-bit weights."""

import json
import logging

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from test_checkpoint import tiny
from tiny_pipeline import tiny_transformer

from l2p_fast.errors import UserError
from l2p_fast.formats.lora import load_lora, read_lora
from l2p_fast.quantize import quantize

MODULE = "layers.1.attention.to_q"


def lora_file(path, style):
    """The same LoRA in several layouts. Returns {our module: delta}."""
    torch.manual_seed(3)
    rank, deltas, file = 4, {}, {}
    block, alpha = "layers.1.attention", 2.0
    a = torch.randn(rank, 64)
    bs = [torch.randn(64, rank) for _ in "qkv"]
    w1a, w1b = torch.randn(rank, 64), torch.randn(170, rank)
    factor = 1.0 if style == "diffusers" else alpha / rank
    for x, b in zip("qkv", bs, strict=True):
        deltas[f"{block}.to_{x}"] = factor * b @ a
    deltas["layers.1.feed_forward.w1"] = factor * w1b @ w1a
    if style == "diffusers":
        for x, b in zip("qkv", bs, strict=True):
            file |= {
                f"transformer.{block}.to_{x}.lora_A.weight": a.clone(),
                f"transformer.{block}.to_{x}.lora_B.weight": b,
            }
        file |= {"transformer.layers.1.feed_forward.w1.lora_A.weight": w1a}
        file |= {"transformer.layers.1.feed_forward.w1.lora_B.weight": w1b}
    elif style == "comfyui":
        for module, (x, y) in {"attention.qkv": (a, torch.cat(bs)), "feed_forward.w1": (w1a, w1b)}.items():
            stem = f"diffusion_model.layers.1.{module}"
            file |= {f"{stem}.lora_down.weight": x, f"{stem}.lora_up.weight": y, f"{stem}.alpha": torch.tensor(alpha)}
    else:
        for module, (x, y) in {"attention_qkv": (a, torch.cat(bs)), "feed_forward_w1": (w1a, w1b)}.items():
            stem = f"lora_unet_layers_1_{module}"
            file |= {f"{stem}.lora_down.weight": x, f"{stem}.lora_up.weight": y, f"{stem}.alpha": torch.tensor(alpha)}
        file |= {"lora_unet_final_layer_linear.lora_down.weight": torch.zeros(4, 64)}
        file |= {"lora_unet_final_layer_linear.lora_up.weight": torch.zeros(64, 4)}
    save_file(file, path)
    return deltas


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "kohya"])
def test_lora_merges(tmp_path, style):
    deltas = lora_file(tmp_path / "l.safetensors", style)
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_lora(model, tmp_path / "l.safetensors", scale=0.5) == 4
    for key, value in model.state_dict().items():
        change = deltas.get(key.removesuffix(".weight"))
        wanted = before[key] if change is None else before[key] + 0.5 * change
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_lora_as_adapter_equals_merged(tmp_path):
    lora_file(tmp_path / "l.safetensors", "comfyui")
    merged, adapted = tiny(), tiny()
    args = torch.randn(1, 3, 32, 32), torch.tensor([0.3]), [torch.randn(5, 48)]
    with torch.no_grad():
        plain = adapted(*args)
        load_lora(merged, tmp_path / "l.safetensors", 0.01)
        load_lora(adapted, tmp_path / "l.safetensors", 0.01, adapter="style")
        torch.testing.assert_close(adapted(*args), merged(*args), rtol=1e-4, atol=1e-5)
        adapted.disable_adapters()
        assert torch.equal(adapted(*args), plain)


def test_lora_of_another_model_is_refused(tmp_path):
    save_file({"layers.77.attention.to_q.lora_A.weight": torch.zeros(4, 64)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="lacks one half"):
        load_lora(tiny(), tmp_path / "half.safetensors")
    pair = {f"layers.77.attention.to_q.lora_{x}.weight": torch.zeros(s) for x, s in (("A", (4, 64)), ("B", (64, 4)))}
    save_file(pair, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not in this model"):
        load_lora(tiny(), tmp_path / "other.safetensors")
    save_file({"layers.0.attention.to_q.hada_w1_a": torch.zeros(4, 4)}, tmp_path / "loha.safetensors")
    with pytest.raises(UserError, match="hada_w1_a"):
        load_lora(tiny(), tmp_path / "loha.safetensors")


def pair(stem, rank=8, rows=64, columns=64, form="lora_{}.weight"):
    generator = torch.Generator().manual_seed(len(stem))
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
    down, up = ("down", "up") if "lora." in form or "kohya" in form else ("A", "B")
    return {f"{stem}.{form.format(down)}": a, f"{stem}.{form.format(up)}": b}


def strength(path, module=MODULE):
    """What the file's pair is multiplied with, as read for a tiny model."""
    b = read_lora(tiny(), path)[module][1]
    return float((b / pair(f"transformer.{module}")[f"transformer.{module}.lora_B.weight"]).mean())


SETTINGS = {
    "alpha": ({"r": 8, "lora_alpha": 32}, 4.0),
    "rslora": ({"r": 8, "lora_alpha": 32, "use_rslora": True}, 32 / 8**0.5),
    "alpha_pattern": ({"r": 8, "lora_alpha": 32, "alpha_pattern": {MODULE: 4}}, 0.5),
    "alpha_pattern by its end": ({"r": 8, "lora_alpha": 32, "alpha_pattern": {"to_q": 2, "to_k": 99}}, 0.25),
    "rank_pattern": ({"r": 4, "lora_alpha": 16, "rank_pattern": {MODULE: 8}}, 2.0),
    "none": ({}, 1.0),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("place", ["metadata", "pipeline's metadata", "adapter_config.json"])
def test_strength_is_obeyed(tmp_path, case, place):
    config, wanted = SETTINGS[case]
    file = pair(f"transformer.{MODULE}")
    if place == "adapter_config.json":
        save_file(file, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
        assert strength(tmp_path) == pytest.approx(wanted)
        assert strength(tmp_path / "adapter_model.safetensors") == pytest.approx(wanted)
        return
    if place.startswith("pipeline"):
        config = {f"transformer.{key}": value for key, value in config.items()} | {"text_encoder.lora_alpha": 7}
    save_file(file, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert strength(tmp_path / "l.safetensors") == pytest.approx(wanted)


def test_what_peft_saves_is_what_it_computes(tmp_path):
    """diffusers' own file of an adapter with patterns and rslora, merged, against PEFT's weights."""
    model, merged, base = tiny(), tiny(), tiny()
    model.add_adapter(
        LoraConfig(
            r=4, lora_alpha=12, use_rslora=True, target_modules=["to_q", "w1"], alpha_pattern={"w1": 2},
            rank_pattern={"w1": 2}, init_lora_weights=False,
        )
    )  # fmt: skip
    model.save_lora_adapter(tmp_path)
    assert load_lora(merged, tmp_path) == 10
    for name in (MODULE, "layers.1.feed_forward.w1"):
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(change, model.get_submodule(name).get_delta_weight("default"), rtol=1e-4, atol=1e-5)
        assert change.norm() > 0.01


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_layers_1_attention_to_q", "lora_transformer_layers_1_attention_to_q",
        "lycoris_layers_1_attention_to_q", "pipe.dit.layers.1.attention.to_q", "layers.1.attention.to_q",
        "base_model.model.layers.1.attention.to_q", "diffusion_model.layers.1.attention.to_q",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["lora_{}.weight", "lora_{}.default.weight", "lora.{}.weight"])
def test_names_of_trainers(tmp_path, stem, form):
    save_file(pair(stem, form=form), tmp_path / "l.safetensors")
    assert read_lora(tiny(), tmp_path / "l.safetensors").keys() == {MODULE}


@pytest.mark.parametrize("name", ["to_out", "to_out.0", "out"])
@pytest.mark.parametrize("prefix", ["transformer.layers.1.attention.", "lora_unet_layers_1_attention_"])
def test_the_output_projection_by_any_name(tmp_path, name, prefix):
    stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    save_file(pair(stem), tmp_path / "l.safetensors")
    assert read_lora(tiny(), tmp_path / "l.safetensors").keys() == {"layers.1.attention.to_out.0"}


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoder.model.layers.0.self_attn.q_proj", "text_encoders.qwen3_4b.layers.0.mlp", "lora_te_layers_0_mlp",
        "lora_te1_layers_0_mlp", "lycoris_te_layers_0_mlp",
    ],
)  # fmt: skip
def test_a_text_encoders_part_is_named_and_skipped(tmp_path, stem, caplog):
    save_file(pair(stem), tmp_path / "only.safetensors")
    with pytest.raises(UserError, match="changes nothing in this model"):
        read_lora(tiny(), tmp_path / "only.safetensors")
    save_file(pair(stem) | pair(f"transformer.{MODULE}"), tmp_path / "both.safetensors")
    with caplog.at_level(logging.WARNING):
        assert read_lora(tiny(), tmp_path / "both.safetensors").keys() == {MODULE}
    assert f"left out 2 tensors of other models: {stem}" in caplog.text


HOSTILE = {
    "no json": ("{", "damaged"),
    "deep": ("[" * 100_000, "damaged"),
    "a list": ("[]", "not a JSON object"),
    "alpha no number": ('{"lora_alpha": "32"}', "lora_alpha must be a number"),
    "alpha too large": ('{"lora_alpha": 1e300}', "lora_alpha must be a number"),
    "a regular expression": ('{"alpha_pattern": {"(a+)+$": 1}}', "not a module's name"),
    "another kind": ('{"peft_type": "LOHA"}', "only plain LoRAs"),
    "dora": ('{"use_dora": true}', "only plain LoRAs"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_metadata(tmp_path, case):
    text, words = HOSTILE[case]
    save_file(pair(MODULE), tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=words):
        read_lora(tiny(), tmp_path / "l.safetensors")


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_merging_into_8_bits_follows_their_scale(tmp_path, bits):
    module = "layers.1.attention.to_q"
    save_file(pair(module, rows=32, columns=32), tmp_path / "l.safetensors")
    plain, rounded = tiny_transformer(), tiny_transformer()
    quantize(rounded, bits)
    before = plain.get_submodule(module).weight.clone()
    for model in (plain, rounded):
        load_lora(model, tmp_path / "l.safetensors", 0.01)
    wanted = plain.get_submodule(module).weight
    got = rounded.get_submodule(module).weight_in(torch.float32)
    assert (wanted - before).norm() > 0.2 * before.norm()
    assert (got - wanted).norm() / wanted.norm() < 0.06


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_an_adapter_over_8_bits(tmp_path, bits):
    save_file(pair(MODULE, rows=32, columns=32), tmp_path / "l.safetensors")
    model = tiny_transformer().to(torch.bfloat16)
    quantize(model, bits)
    x, (a, b) = torch.randn(1, 32, 32, dtype=torch.bfloat16), read_lora(model, tmp_path / "l.safetensors")[MODULE]
    with torch.no_grad():
        plain = model.get_submodule(MODULE)(x).float()
        load_lora(model, tmp_path / "l.safetensors", 0.1, adapter="style")
        wanted, got = plain + 0.1 * x.float() @ a.T @ b.T, model.get_submodule(MODULE)(x).float()
        assert (got - wanted).norm() / wanted.norm() < 0.02 < (wanted - plain).norm() / wanted.norm()
        model.disable_adapters()
        assert torch.equal(model.get_submodule(MODULE)(x).float(), plain)


def test_bare_float8_weights_are_refused(tmp_path):
    save_file(pair(MODULE), tmp_path / "l.safetensors")
    model = tiny()
    module = model.get_submodule(MODULE)
    module.weight = torch.nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="quantized weights of layers.1.attention.to_q"):
        load_lora(model, tmp_path / "l.safetensors")


def test_an_infinite_sum_changes_nothing(tmp_path):
    save_file(pair("layers.0.attention.to_q") | pair(MODULE), tmp_path / "l.safetensors")
    model = tiny().to(torch.float16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="try a lower scale"):
        load_lora(model, tmp_path / "l.safetensors", 1e6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="finite number"):
        load_lora(model, tmp_path / "l.safetensors", float("nan"))
