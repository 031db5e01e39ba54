"""LoRA files of every trainer: names, strength, what is skipped and refused, merging into plain and 8-bit weights."""

import json
import logging

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from test_checkpoint import tiny
from tiny_pipeline import tiny_transformer

from l2p_fast import load_lora, ops
from l2p_fast.errors import UserError
from l2p_fast.formats.lora import read_lora
from l2p_fast.models.adapters import shapes_of
from l2p_fast.quantize import quantize

MODULE = "layers.1.attention.to_q"


def read(path, model=None):
    return read_lora(shapes_of(model or tiny()), path)


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


def test_what_does_not_fit_is_named(tmp_path, caplog):
    path = tmp_path / "l.safetensors"
    save_file({f"{MODULE}.lora_A.weight": torch.zeros(4, 64)}, path)
    with pytest.raises(UserError, match="lacks up, one half"):
        load_lora(tiny(), path)
    other, wide = pair("layers.77.attention.to_q"), pair("layers.0.attention.to_k", columns=32)
    for misfit, words in ((other, "not in this model"), (wide, "for a weight of .64, 32., the model's is .64, 64.")):
        save_file(misfit, path)
        with pytest.raises(UserError, match=f"changes nothing in this model .*{words}"):
            load_lora(tiny(), path)
        caplog.clear()
        save_file(misfit | pair(MODULE), path)
        assert load_lora(tiny(), path) == 1
        assert "left out 1 layers" in caplog.text
    save_file({"layers.0.attention.to_q.oft_diag": torch.zeros(4, 4)} | pair(MODULE), path)
    with pytest.raises(UserError, match="of a kind that is not read .*oft_diag"):
        load_lora(tiny(), path)


def pair(stem, rank=8, rows=64, columns=64, form="lora_{}.weight"):
    generator = torch.Generator().manual_seed(len(stem))
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
    down, up = ("down", "up") if "lora." in form or "kohya" in form else ("A", "B")
    return {f"{stem}.{form.format(down)}": a, f"{stem}.{form.format(up)}": b}


def strength(path, module=MODULE):
    """What the file's pair is multiplied with, as read for a tiny model."""
    b = read(path)[module].kind.up
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
    assert read(tmp_path / "l.safetensors").keys() == {MODULE}


@pytest.mark.parametrize("name", ["to_out", "to_out.0", "out"])
@pytest.mark.parametrize("prefix", ["transformer.layers.1.attention.", "lora_unet_layers_1_attention_"])
def test_the_output_projection_by_any_name(tmp_path, name, prefix):
    stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    save_file(pair(stem), tmp_path / "l.safetensors")
    assert read(tmp_path / "l.safetensors").keys() == {"layers.1.attention.to_out.0"}


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
        read(tmp_path / "only.safetensors")
    save_file(pair(stem) | pair(f"transformer.{MODULE}"), tmp_path / "both.safetensors")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "both.safetensors").keys() == {MODULE}
    assert f"left out 2 tensors that are no part of it: {stem}" in caplog.text


HOSTILE = {
    "no json": ("{", "damaged"),
    "deep": ("[" * 100_000, "damaged"),
    "a list": ("[]", "not a JSON object"),
    "alpha no number": ('{"lora_alpha": "32"}', "lora_alpha must be a number"),
    "alpha too large": ('{"lora_alpha": 1e300}', "lora_alpha must be a number"),
    "a regular expression": ('{"alpha_pattern": {"(a+)+$": 1}}', "not a module's name"),
    "another kind": ('{"peft_type": "OFT"}', "is of a OFT"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_metadata(tmp_path, case):
    text, words = HOSTILE[case]
    save_file(pair(MODULE), tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=words):
        read(tmp_path / "l.safetensors")


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
    x, kind = torch.randn(1, 32, 32, dtype=torch.bfloat16), read(tmp_path / "l.safetensors", model)[MODULE].kind
    with torch.no_grad():
        plain = model.get_submodule(MODULE)(x).float()
        load_lora(model, tmp_path / "l.safetensors", 0.1, adapter="style")
        wanted, got = plain + 0.1 * x.float() @ kind.delta().T, model.get_submodule(MODULE)(x).float()
        assert (got - wanted).norm() / wanted.norm() < 0.02 < (wanted - plain).norm() / wanted.norm()
        model.disable_adapters()
        assert torch.equal(model.get_submodule(MODULE)(x).float(), plain)


def test_fusing_is_all_or_nothing(tmp_path, monkeypatch):
    """A layer that can't take its adapter is named before another changes; a hub's file is read as any other."""
    from l2p_fast.sampling.pipeline import L2PPipeline, make_scheduler

    pairs = pair("layers.0.attention.to_q", rows=32, columns=32) | pair(MODULE, rows=32, columns=32)
    save_file(pairs | {f"{MODULE}.lora_B.bias": torch.ones(32)}, tmp_path / "l.safetensors")
    pipe = L2PPipeline(tiny_transformer(), None, None, make_scheduler())
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or tmp_path / a[1])
    pipe.load_lora_weights("some/style", weight_name="l.safetensors", revision="main", adapter_name="style")
    assert asked == [(("some/style", "l.safetensors"), {"revision": "main"})]
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    with pytest.raises(UserError, match=f"{MODULE}: a LoRA can't be fused .* where a bias is lacking"):
        pipe.fuse_lora()
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())
    monkeypatch.undo()
    with pytest.raises(UserError, match="can't get l.safetensors of some/style from the hub"):
        pipe.load_lora_weights("some/style", weight_name="l.safetensors", local_files_only=True)


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


# --- Other kinds than plain pairs ---
def draws(*shapes, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def loha(stem, rows=64):
    a1, b1, a2, b2 = draws((rows, 3), (3, 64), (rows, 3), (3, 64))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    file = {f"{stem}.{name}": value for name, value in zip(names, (a1, b1, a2, b2), strict=True)}
    return file | {f"{stem}.alpha": torch.tensor(1.5)}, 0.5 * (a1 @ b1) * (a2 @ b2)


def lokr(stem, rows=64):
    w1, a, b = draws((4, 8), (rows // 4, 2), (2, 8))
    file = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2_a": a, f"{stem}.lokr_w2_b": b, f"{stem}.alpha": torch.tensor(6.0)}
    return file, 3.0 * torch.kron(w1, a @ b)


def lokr_whole(stem, rows=64):
    w1, w2 = draws((4, 8), (rows // 4, 8))
    return {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1e10)}, torch.kron(w1, w2)


def difference(stem, rows=64):
    (diff,) = draws((rows, 64))
    return {f"{stem}.diff": diff}, diff


def dora(stem, rows=64, columns=False):
    a, b = draws((4, 64), (rows, 4))
    m = draws((1, 64) if columns else (rows, 1), seed=6)[0].abs() + 1
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.dora_scale": m}, (a, b, m)


@pytest.mark.parametrize("kind", [loha, lokr, lokr_whole, difference])
@pytest.mark.parametrize("stem", ["layers.1.attention.to_q", "lycoris_layers_1_attention_qkv"])
def test_other_kinds_merge_and_adapt(tmp_path, kind, stem):
    path = tmp_path / "l.safetensors"
    file, delta = kind(stem, 192 if stem.endswith("qkv") else 64)
    save_file(file, path)
    merged, adapted, plain = tiny(), tiny(), tiny()
    load_lora(merged, path, 0.1)
    load_lora(adapted, path, 0.1, adapter="style")
    x = draws((1, 5, 64))[0]
    for name, part in zip("qkv", delta.chunk(3) if stem.endswith("qkv") else [delta], strict=False):
        wanted = plain.get_submodule(f"layers.1.attention.to_{name}").weight + 0.1 * part
        torch.testing.assert_close(merged.get_submodule(f"layers.1.attention.to_{name}").weight, wanted)
        got = adapted.get_submodule(f"layers.1.attention.to_{name}")(x)
        torch.testing.assert_close(got, x @ wanted.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [False, True])
def test_dora(tmp_path, columns):
    """The formula, merged, over plain weights and over 8 bits; half of it lies halfway."""
    path, module = tmp_path / "l.safetensors", "t_embedder.mlp.2"  # it has a bias
    merged, adapted, rounded = tiny(), tiny(), tiny()
    weight = merged.get_submodule(module).weight.detach().clone()
    a, b = draws((4, weight.shape[1]), (weight.shape[0], 4))
    m = draws((1, weight.shape[1]) if columns else (weight.shape[0], 1), seed=6)[0].abs() + 1
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b, f"{module}.dora_scale": m}, path)
    whole = weight + b @ a
    wanted = 0.5 * weight + 0.5 * m * whole / whole.norm(dim=0 if columns else 1, keepdim=True)
    load_lora(merged, path, 0.5)
    torch.testing.assert_close(merged.get_submodule(module).weight, wanted, rtol=1e-4, atol=1e-5)
    load_lora(adapted, path, 0.5, adapter="style")
    x = draws((3, weight.shape[1]))[0]
    got = adapted.get_submodule(module)(x)
    torch.testing.assert_close(got, merged.get_submodule(module)(x), rtol=1e-4, atol=1e-4)

    file, _ = dora(MODULE, columns=columns)
    save_file(file, path)
    quantize(rounded, "int8")
    plain = tiny()
    for model in (rounded, plain):
        load_lora(model, path, adapter="style")
    x = draws((1, 32, 64))[0]
    got, wanted = (model.get_submodule(MODULE)(x) for model in (rounded, plain))
    assert (got - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("config", [
    LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=["to_q"], init_lora_weights=False),
    LoHaConfig(r=4, alpha=12, target_modules=["to_q"], init_weights=False),
    LoKrConfig(r=4, alpha=12, decompose_factor=4, target_modules=["to_q"], init_weights=False),
    LoKrConfig(r=60, alpha=12, decompose_factor=4, target_modules=["to_q"], init_weights=False),
], ids=lambda config: f"{config.peft_type.value}-{config.r}")  # fmt: skip
def test_what_peft_saves_of_other_kinds(tmp_path, config):
    """PEFT's own files of DoRA, LoHa and LoKr against what PEFT computes."""
    torch.manual_seed(0)
    model, merged = get_peft_model(tiny(), config), tiny()
    if config.peft_type.value == "LORA":
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.data *= 1.5
    model.save_pretrained(tmp_path)
    assert get_peft_model_state_dict(model)
    load_lora(merged, tmp_path)
    x = draws((1, 5, 64))[0]
    wanted = model.base_model.model.get_submodule(MODULE)(x)
    torch.testing.assert_close(merged.get_submodule(MODULE)(x), wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - tiny().get_submodule(MODULE)(x)).norm() > 0.02 * wanted.norm()


def test_biases_norms_and_tokens(tmp_path):
    path, merged, plain = tmp_path / "l.safetensors", tiny(), tiny()
    biased, norm = "layers.0.adaLN_modulation.0", "layers.0.attention_norm1"
    bias, scale, token = draws(tuple(plain.get_submodule(biased).bias.shape), (64,), (1, 64))
    file = {f"diffusion_model.{biased}.diff_b": bias, f"diffusion_model.{norm}.w_norm": scale}
    save_file(file | {"diffusion_model.x_pad_token.diff": token}, path)
    assert load_lora(merged, path, 0.5) == 3
    torch.testing.assert_close(merged.get_submodule(biased).bias, plain.get_submodule(biased).bias + 0.5 * bias)
    torch.testing.assert_close(merged.get_submodule(norm).weight, plain.get_submodule(norm).weight + 0.5 * scale)
    torch.testing.assert_close(merged.x_pad_token, plain.x_pad_token + 0.5 * token)
    with pytest.raises(UserError, match="no adapter can lie over .*merge it"):
        load_lora(merged, path, adapter="style")

    lora = pair(MODULE) | {f"{MODULE}.lora_B.bias": bias[:64].clone()}
    save_file(lora, path)
    with pytest.raises(UserError, match="missing bias of layers.1.attention.to_q; give adapter=NAME"):
        load_lora(merged, path)
    load_lora(plain, path, 0.1, adapter="style")
    x = draws((1, 5, 64))[0]
    change = plain.get_submodule(MODULE)(x) - tiny().get_submodule(MODULE)(x)
    a, b = lora[f"{MODULE}.lora_A.weight"], lora[f"{MODULE}.lora_B.weight"]
    torch.testing.assert_close(change, 0.1 * (x @ a.T @ b.T + bias[:64]), rtol=1e-3, atol=1e-4)


def test_the_head_is_merged(tmp_path):
    path, name, model, plain = tmp_path / "l.safetensors", "local_decoder.enc1.0", tiny(), tiny()
    shape = plain.get_submodule(name).weight.shape
    down, up = draws((2, *shape[1:]), (shape[0], 2, 1, 1))
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    with pytest.raises(UserError, match="no adapter can lie over local_decoder.enc1.0"):
        load_lora(model, path, adapter="style")
    load_lora(model, path)
    wanted = torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    torch.testing.assert_close(model.get_submodule(name).weight - plain.get_submodule(name).weight, wanted)


@pytest.mark.parametrize("order", [1, -1])
def test_a_fused_copy_beside_the_split_one(tmp_path, order):
    split = [pair(f"layers.1.attention.to_{x}", form="lora.{}.weight") for x in "qkv"]
    fused = pair("layers.1.attention.qkv", rows=192, form="lora.{}.weight")
    file = {}
    for part in [fused, *split][::order]:
        file |= part
    save_file(file, tmp_path / "l.safetensors")
    found = read(tmp_path / "l.safetensors")
    assert len(found) == 3
    assert torch.equal(found[MODULE].kind.up, split[0][f"{MODULE}.lora.up.weight"])


def test_several_adapters_and_fusing(tmp_path):
    """Adapters of every kind on one layer, weighted, fused and taken out; the model is as before in the end."""
    kinds = {"lora": pair(MODULE), "loha": loha(MODULE)[0], "dora": dora(MODULE)[0], "full": difference(MODULE)[0]}
    model, x = tiny(), draws((1, 5, 64))[0]
    layer = lambda: model.get_submodule(MODULE)  # noqa: E731
    plain, weight, alone = layer()(x), layer().weight.clone(), {}
    for name, file in kinds.items():
        save_file(file, tmp_path / "l.safetensors")
        load_lora(model, tmp_path / "l.safetensors", adapter=name)
        alone[name] = layer()(x) - plain
    scales = [0.1, 0.2, 0.3, 0.4]
    model.set_adapters(list(kinds), scales)
    wanted = plain + sum(s * alone[name] for s, name in zip(scales, kinds, strict=True))
    torch.testing.assert_close(layer()(x), wanted, rtol=1e-4, atol=1e-3)
    model.fuse_lora()
    assert not torch.equal(layer().weight, weight)
    torch.testing.assert_close(layer()(x), wanted, rtol=1e-4, atol=1e-3)
    model.unfuse_lora()
    torch.testing.assert_close(layer().weight, weight, rtol=1e-4, atol=1e-5)
    model.disable_lora()
    torch.testing.assert_close(layer()(x), plain, rtol=1e-4, atol=1e-4)
    model.enable_lora()
    model.delete_adapters(["loha", "dora"])
    model.set_adapters(["lora", "full"], [0.1, 0.4])
    torch.testing.assert_close(layer()(x), plain + 0.1 * alone["lora"] + 0.4 * alone["full"], rtol=1e-4, atol=1e-3)
    with pytest.raises(UserError, match="an adapter full already"):
        load_lora(model, tmp_path / "l.safetensors", adapter="full")
    model.save_lora_adapter(tmp_path, adapter_name="lora")
    again = read(tmp_path / "pytorch_lora_weights.safetensors")[MODULE].kind
    assert torch.equal(again.down, pair(MODULE)[f"{MODULE}.lora_A.weight"])
    model.unload_lora()
    assert type(layer()) is ops.Linear
    assert model.state_dict().keys() == tiny().state_dict().keys()
