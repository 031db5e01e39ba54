"""Pixel models of other sources than Z-Image: against diffusers' own pipelines, and by the same commands."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sources import SOURCES, latent, pipeline, save_source
from tiny_training import curve, run_ranks

from l2p_fast import convert, evaluate, sample, train
from l2p_fast.errors import UserError, run_cli
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.formats.sources import LAYOUTS, layout_of
from l2p_fast.loading import build_empty, load_lora, load_loras, load_model, load_text_encoders
from l2p_fast.quantize import CodedLinear
from l2p_fast.quantize.products import LowBitLinear, is_quantized
from l2p_fast.sampling.offload import arrange
from l2p_fast.sampling.pipeline import load_pipeline
from l2p_fast.training.config import FreezeConfig, LoraConfig
from l2p_fast.training.freeze import freeze
from l2p_fast.training.pairs import targets

PROMPTS = ["a red star", "two blue circles above a green one"]
SHORT = ("flux2", "qwen_image")  # go the whole road in the default run
TOKENS = {"flux": 24, "flux2": 128, "qwen_image": 256, "sd3": 24}  # of a prompt, in the comparison


def make_images(place, count, side):
    rng = np.random.default_rng(0)
    place.mkdir()
    rows = [(f"{i}.png", f"image {i}", i) for i in range(count)]
    for name, _, _ in rows:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(place / name)
    with open(place / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", "seed"), *rows])


class Seen(Exception):
    """Diffusers' pipeline has come to the last norm."""


@pytest.fixture(scope="module", params=SOURCES)
def source(request):
    return request.param


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return save_source(tmp_path_factory.mktemp(source), source)


@pytest.fixture(scope="module")
def init(folder):
    """The pixel model that `convert init` makes of the folder."""
    out = folder / "init.safetensors"
    assert convert.main(["init", str(folder), "--res", "1k", "--head-width", "0.05", "--out", str(out)]) == 0
    return out


def features_of_diffusers(source, embed, height, width, sigma):
    """(B, N, D) before the last norm in diffusers' pipeline, whose image tokens are those that ``embed`` gives."""
    pipe, found = pipeline(source), []
    transformer = pipe.transformer

    def stop(_, given):
        found.append(given[0])
        raise Seen

    where = {"qwen_image": "img_in", "sd3": "pos_embed.proj"}.get(source, "x_embedder")
    transformer.get_submodule(where).register_forward_hook(lambda *_: embed())
    transformer.norm_out.register_forward_pre_hook(stop)
    own = {
        "flux": {"guidance_scale": 3.5},
        "flux2": {"guidance_scale": 1.0, "text_encoder_out_layers": (1, 2, 3)},
        "qwen_image": {"true_cfg_scale": 1.0},
        "sd3": {"guidance_scale": 1.0},
    }[source]
    with pytest.raises(Seen):
        pipe(prompt=PROMPTS, height=height, width=width, sigmas=[sigma], num_inference_steps=1, output_type="latent",
             max_sequence_length=TOKENS[source], **own)  # fmt: skip
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), pytest.param((80, 48), marks=pytest.mark.slow)], ids=str)
def test_body_is_that_of_diffusers_pipeline(source, folder, init, size):
    """Time, guidance, places, texts of different lengths and their padding, all as the source's own pipeline has it."""
    model = load_model(init, torch.float32)
    torch.manual_seed(5)
    pixels, sigma = torch.randn(2, 3, *size), 0.6
    encoders = load_text_encoders(folder, source)
    texts = model.encode(encoders, PROMPTS, torch.device("cpu"), TOKENS[source])
    tokens = []
    hook = model.embedder.register_forward_hook(lambda _, __, out: tokens.append(out))
    ours = model.features(pixels, torch.full((2,), 1 - sigma), texts)
    hook.remove()
    theirs = features_of_diffusers(source, lambda: tokens[0], *size, sigma)
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.1


@torch.no_grad()
def test_ragged_texts_do_not_see_each_other(init):
    model = load_model(init, torch.float32)
    torch.manual_seed(6)
    pixels, times = torch.randn(3, 3, 32, 48), torch.tensor([0.2, 0.5, 0.9])
    texts = [torch.randn(n, model.text_width) for n in (4, 11, 7)]
    together = model.features(pixels, times, texts)
    for i in range(3):
        alone = model.features(pixels[i : i + 1], times[i : i + 1], texts[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    cond = model.prepare(texts, 32, 48, times)
    prepared = model(pixels, times[1].expand(3), cond=cond, step=1)
    torch.testing.assert_close(prepared, model(pixels, times[1].expand(3), texts))


def test_files_tell_the_model(source, folder, init):
    """Names and shapes alone, at this width and at the published one."""
    latent_file, pixel = Checkpoint(folder), Checkpoint(init)
    assert (latent_file.kind(), pixel.kind()) == ("latent", "l2p")
    assert latent_file.layout is pixel.layout is LAYOUTS[source]
    config = pixel.l2p_config()
    assert config["pixel_patch_size"] == 16 and config["head_width"] == 0.05
    model = load_model(init)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == pixel.shapes
    state = latent(source).state_dict()
    copied = [key for key in state if key in pixel.shapes and state[key].shape == pixel.shapes[key]]
    assert all(torch.equal(pixel.tensor(key), state[key]) for key in copied)
    assert not {key for key in pixel.shapes.keys() - set(copied) if not key.startswith(pixel.layout.pixel_parts)}
    full = build_empty({"num_layers": 2, **({"dual_attention_layers": (1,)} if source == "sd3" else {})}, source)
    shapes = {key: tuple(value.shape) for key, value in full.state_dict().items()}
    assert layout_of(shapes) is LAYOUTS[source]
    told = layout_of(shapes).infer(shapes)
    assert layout_of(shapes).shapes(told) == shapes
    assert {name: told[name] for name in told if full.config[name] != told[name]} == {}


# Of each row of the documentation's table: source, and what is not the class's default.
SD3_LARGE = {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "dual_attention_layers": ()}
PUBLISHED = {
    "Z-Image": ("zimage", {}), "FLUX.2 [klein] 4B": ("flux2", {}), "SD 3.5 Medium": ("sd3", {}),
    "SD 3.5 Large": ("sd3", SD3_LARGE), "FLUX.1 [schnell]": ("flux", {}),
    "FLUX.1 [dev]": ("flux", {"guidance_embeds": True}), "Qwen-Image": ("qwen_image", {}),
}  # fmt: skip


def test_the_documented_sizes():
    """Every number of the table in docs/sources.md, of models without memory."""
    page = (Path(__file__).parents[1] / "docs" / "sources.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 9]
    rows = [row for row in rows if row[0] in PUBLISHED]
    assert len(rows) == 14 and {row[0] for row in rows} == set(PUBLISHED)
    for title, patch, width, blocks, parameters, head, *trained in rows:
        name, config = PUBLISHED[title]
        size = {"all_patch_size": (int(patch),)} if name == "zimage" else {"pixel_patch_size": int(patch)}
        model = build_empty(config | size, name)
        whole = sum(p.numel() for p in model.parameters())
        told = [str(model.width), str(len(model.main_blocks())), f"{whole / 1e9:.3f}",
                f"{sum(p.numel() for p in model.head.parameters()) / 1e6:.1f}"]  # fmt: skip
        for policy in ("paper", "published"):
            freeze(model, FreezeConfig(policy, 5))
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            told.append(f"{count / 1e9:.3f} ({count / whole:.0%})")
        assert told == [width, blocks, parameters, head, *trained], (title, patch)


# --- By the same commands --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world(init, folder):
    """Images and a configuration; texts are encoded by the source's folder."""
    make_images(folder / "data", 4, 32)
    config = {
        "steps": 2, "save_every": 2, "device": "cpu",
        "model": {"base": str(init), "weights": "float32", "compute": "float32"},
        "freeze": {"policy": "paper", "n": 1},
        "data": {"path": str(folder / "data"), "text_encoder": str(folder), "features": str(folder / "features"),
                 "workers": 1, "grids": [{"tokens": 4, "batch": 2}]},
        "optim": {"kind": "adamw", "lr": 1e-3}, "log": {"board": "none"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.mark.parametrize(
    "source", [*SHORT, *(pytest.param(s, marks=pytest.mark.slow) for s in SOURCES if s not in SHORT)], indirect=True
)
def test_from_a_folder_to_an_image(source, folder, init, world, capsys):
    """init, train, merge and sample: only the first and last block, the embedding and the head are trained."""
    run = folder / "run"
    assert train.main([str(world), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "transformer_blocks" in plan and "local_decoder" in plan
    assert train.main([str(world), f"run={run}", "log.sample_every=2", "log.prompts=[a star]", "log.sample_steps=1",
                       "log.height=32", "log.width=32", "log.guidance=1"]) == 0  # fmt: skip
    trained = Checkpoint(run / "trained.safetensors")
    last = "single_transformer_blocks.1." if len(trained.layout.stacks) > 1 else None
    last = last or f"transformer_blocks.{load_model(init).config.num_layers - 1}."
    parts_of = ("transformer_blocks.0.", last, *trained.layout.pixel_parts)
    wanted = {key for key in Checkpoint(init).shapes if key.startswith(parts_of) and key != "pos_embed.pos_embed"}
    wanted -= {key for key in wanted if key.startswith(load_model(init).idle)}
    assert trained.kind() == "delta" and set(trained.shapes) == wanted
    whole = folder / "whole.safetensors"
    assert convert.main(["merge", str(run / "trained.safetensors"), "--base", str(init), "--out", str(whole)]) == 0
    image = folder / "star.png"
    assert sample.main(["a red star", "--model", str(whole), "--text-encoder", str(folder), "--height", "32",
                        "--width", "48", "--steps", "2", "--guidance", "3", "--out", str(image)]) == 0  # fmt: skip
    assert Image.open(image).size == (48, 32)


def test_planned_and_offloaded(source, folder, init, capsys):
    """The plan counts every text encoder; blocks and encoders that wait their turn change no image."""
    asked = ["a red star", "--model", str(init), "--text-encoder", str(folder), "--res", "32", "--dry-run"]
    assert sample.main([*asked, "--device-gb", "8", "--offload", "auto"]) == 0
    assert "none: " in capsys.readouterr().out
    draw = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    images = []
    for how in ("none", "blocks"):
        pipe = load_pipeline(init, folder)
        pipe.set_progress_bar_config(disable=True)
        arrange(pipe, how, torch.device("cpu"))
        images.append(pipe("a red star", generator=torch.Generator().manual_seed(1), **draw).images)
    assert torch.equal(*images)


def test_text_encoders_in_8_bits(source, folder, init):
    model = load_model(init, torch.float32)

    def features(quantize):
        encoders = load_text_encoders(folder, source, torch.float32, quantize=quantize)
        (found,) = model.encode(encoders, ["a red star"], torch.device("cpu"), model.max_tokens)
        return found, sum(isinstance(m, CodedLinear) for encoder, _ in encoders for m in encoder.modules())

    (plain, none), (rounded, some) = features(None), features("int8")
    assert none == 0 < some and 0 < (rounded - plain).norm() / plain.norm() < 0.03


def test_a_pipeline_folder_keeps_all_parts(source, folder, init, tmp_path):
    pipe = load_pipeline(init, folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "p")
    again = load_pipeline(tmp_path / "p")
    again.set_progress_bar_config(disable=True)
    draw = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    images = [one("a red star", generator=torch.Generator().manual_seed(1), **draw).images for one in (pipe, again)]
    assert torch.equal(*images)
    assert again.default_steps == 30


CACHES = {
    "none at all": lambda step: FirstBlockCacheConfig(threshold=0.0),
    "first block": lambda step: FirstBlockCacheConfig(threshold=1e3),
    "magnitudes": lambda step: MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4, retention_ratio=0.25),
    "attention": lambda step: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=4, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: step[0],
    ),
    "series": lambda step: TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=1, max_order=0),
}  # fmt: skip


@pytest.mark.parametrize(
    "source", [pytest.param(s, marks=pytest.mark.slow) if s == "flux" else s for s in SOURCES], indirect=True
)
def test_caches(source, init, folder):
    """Of four steps some are skipped, but by a cache that is never content; a second run is as the first."""
    pipe, calls, step = load_pipeline(init, folder), [], [500]
    pipe.set_progress_bar_config(disable=True)
    draw = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}

    def images():
        calls.clear()
        drawn = pipe("a red star", generator=torch.Generator().manual_seed(1), **draw).images
        return drawn, len(calls)

    *_, (_, last) = pipe.transformer.blocks()
    part = next(layer for path, layer in last.named_modules() if path.startswith("attn.to_q"))
    part.register_forward_hook(lambda *_: calls.append(1))
    plain, whole = images()
    for cache, config in CACHES.items():
        pipe.transformer.enable_cache(config(step))
        (first, ran), (second, again) = images(), images()
        assert torch.equal(first, second) and ran == again, cache
        if cache == "none at all":
            assert ran == whole and torch.allclose(first, plain, atol=1e-5)
        else:
            assert 0 < ran < whole and 0 < (first - plain).abs().max() < 1, cache
        pipe.transformer.disable_cache()
        assert torch.equal(images()[0], plain), cache


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_few_bits_for_drawing(source, init, folder, name, capsys):
    """Layers with a bias, too; those that see the time alone stay as they are. The plan counts them."""
    exact, model = load_model(init, torch.float32), load_model(init, torch.float32, quantize=name)
    rounded = {path: m for path, m in model.named_modules() if isinstance(m, LowBitLinear)}
    blocks = dict(model.blocks())
    fits = {
        f"{stack}.{path}" for stack, block in exact.blocks() for path, m in block.named_modules()
        if isinstance(m, torch.nn.Linear) and is_quantized(m, name) and not re.search("norm|mod", path)
    }  # fmt: skip
    assert set(rounded) == fits and all(path.startswith(tuple(blocks)) for path in rounded)
    assert any(m.bias is not None for m in rounded.values()) == (source != "flux2")
    torch.manual_seed(8)
    given = torch.randn(1, 3, 32, 48), torch.tensor([0.4]), [torch.randn(9, model.text_width)]
    with torch.no_grad():
        wanted, found = exact.features(*given), model.features(*given)
        assert 0 < (found - wanted).norm() / wanted.norm() < (0.05 if name == "int8" else 0.3)
        half, whole = (torch.nn.Module.to(m, torch.bfloat16).features(*given) for m in (model, exact))
    assert half.dtype == torch.bfloat16 and (half - whole).float().norm() / wanted.norm() < 0.5
    argv = ["x", "--model", str(init), "--text-encoder", str(folder), "--height", "32", "--width", "48"]
    plans = []
    for how in ("none", name):
        assert sample.main([*argv, "--quantize", how, "--dry-run"]) == 0
        plans.append(capsys.readouterr().out)
    assert all("total" in plan and "text encoder" in plan for plan in plans)


@pytest.mark.parametrize(
    "source", [*SHORT, *(pytest.param(s, marks=pytest.mark.slow) for s in SOURCES if s not in SHORT)], indirect=True
)
def test_a_lora_from_training_to_an_image(source, folder, init, world, capsys):
    """Pairs over all layers of the blocks, trained with and without checkpointing, drawn, merged and evaluated."""
    settings = [str(world), "lora.rank=2", "freeze.policy=none", "optim.lr=0.1"]
    assert train.main([*settings, "--dry-run"]) == 0 and "LoRA of rank 2" in capsys.readouterr().out
    runs = [folder / "lora", folder / "lora-kept"]
    assert train.main([*settings, f"run={runs[0]}"]) == 0
    assert train.main([*settings, f"run={runs[1]}", "memory.checkpointing=false"]) == 0
    for one, other in zip(*map(curve, runs), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    file, model = runs[0] / "lora.safetensors", load_model(init).requires_grad_(False)
    layers = {key.split(".lora_")[0].removeprefix("transformer.") for key in load_file(file)}
    assert layers == set(targets(model, LoraConfig(rank=2)))
    assert {name.rpartition(".")[0] for name, _ in model.blocks()} == {name.split(".")[0] for name in layers}
    whole = folder / "with-lora.safetensors"
    assert convert.main(["merge", str(file), "--base", str(init), "--out", str(whole)]) == 0
    torch.manual_seed(9)
    given = torch.randn(1, 3, 32, 48), torch.tensor([0.4]), [torch.randn(9, model.text_width)]
    models = {
        "base": load_model(init, torch.float32),
        "merged": load_model(whole, torch.float32),
        "over": load_model(init, torch.float32),
        "rounded": load_model(init, torch.float32, quantize="int8"),
    }
    load_lora(models["over"], file, adapter="style")
    load_loras(models["rounded"], [(file, 1.0)])
    with torch.no_grad():
        found = {kind: model.features(*given) for kind, model in models.items()}
    changed = (found["merged"] - found["base"]).norm()
    assert changed > 0.05 * found["base"].norm()
    torch.testing.assert_close(found["over"], found["merged"], rtol=1e-4, atol=1e-4)
    assert (found["rounded"] - found["merged"]).norm() < 0.5 * changed

    (folder / "p.txt").write_text("a red star\n")
    assert (
        evaluate.main(
            [
                "prompts",
                str(folder / "p.txt"),
                "--model",
                str(init),
                "--text-encoder",
                str(folder),
                "--height",
                "32",
                "--width",
                "48",
                "--steps",
                "1",
                "--lora",
                str(file),
                "--quantize",
                "8bit",
                "--out",
                str(folder / "drawn"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert f"{len(layers)} as adapters" in said and "| grid (16 px) |" in said
    assert convert.main(["export-lora", str(file), "--base", str(init), "--layout", "diffusers",
                         "--out", str(folder / "exported.safetensors")]) == 0  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_shards_and_frozen_blocks_in_few_bits(world, folder, bits):
    """Two processes that share the model, its frozen blocks in few bits, give what one gives."""
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    settings = [f"model.frozen_bits={bits}", "steps=2"]
    assert train.main([str(world), *settings, f"run={folder / f'one-{bits}'}"]) == 0
    run_ranks(2, [str(world), *settings, f"run={folder / f'two-{bits}'}"], folder / f"log-{bits}")
    curves = (curve(folder / f"{name}-{bits}") for name in ("one", "two"))
    for step, (one, two) in enumerate(zip(*curves, strict=True), 1):
        assert one[0] == two[0] == step and one[1:] == pytest.approx(two[1:], rel=1e-4)


# --- Strangers' folders ----------------------------------------------------------------------------------------------
def edit(name, **changes):
    def make(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def gone(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def pickled(folder):
    path = folder / "text_encoder_2" / "model.safetensors"
    torch.save(load_file(path), folder / "text_encoder_2" / "pytorch_model.bin")
    path.unlink()


def without(part, key):
    def make(folder):
        path = folder / part / "model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if name != key}, path)

    return make


T5, CLIP, VL = "text_encoder_2/config.json", "text_encoder/config.json", "text_encoder/config.json"
BAD_FOLDERS = {
    "no second encoder": ("flux", gone("text_encoder_2"), "has no folder text_encoder_2"),
    "no second tokenizer": ("flux", gone("tokenizer_2"), "has no folder tokenizer_2"),
    "a truncated encoder": ("flux", cut("text_encoder_2/model.safetensors"), "truncated"),
    "a pickle": ("flux", pickled, "only pickles"),
    "a missing tensor": ("flux", without("text_encoder", "final_layer_norm.bias"), "1 missing (final_layer_norm.bias"),
    "a T5 for a CLIP": ("flux", edit(CLIP, model_type="t5"), "not a clip_text_model"),
    "a huge T5": ("flux", edit(T5, num_layers=10**9), "num_layers must be a number"),
    "a T5 of another depth": ("flux", edit(T5, num_layers=1), "unexpected"),
    "another activation": ("flux", edit(CLIP, hidden_act="os.system"), "hidden_act must be one of"),
    "heads that don't fit": ("flux", edit(CLIP, num_attention_heads=5), "can't be cut into 5 heads"),
    "another tokenizer": ("flux", edit("tokenizer_2/tokenizer_config.json", tokenizer_class="Evil"), "holds a Evil"),
    "no tokenizer.json": ("flux", gone("tokenizer_2/tokenizer.json"), "lacks tokenizer.json"),
    "a tokenizer that names a file": (
        "flux", edit("tokenizer/tokenizer_config.json", vocab_file="/etc/passwd"), "names files of its own",
    ),
    "more places than the encoder has": (
        "flux", edit("tokenizer/tokenizer_config.json", model_max_length=10**30), "model_max_length must be",
    ),
    "RoPE without sections": ("qwen_image", edit(VL, text_config=None), "vocab_size must be a number"),
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    place = tmp_path_factory.mktemp("clean")
    return {source: save_source(place / source, source) for source in ("flux", "qwen_image")}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_text_encoders(clean, tmp_path, case, capsys):
    source, make, words = BAD_FOLDERS[case]
    shutil.copytree(clean[source], tmp_path / "f")
    make(tmp_path / "f")
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: load_text_encoders(tmp_path / "f", source) and 0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 500, said
    assert words in said, said


def test_bad_transformers(clean, tmp_path):
    """Of a transformer, too, one line says what is wrong; code and classes that a folder names are never looked at."""
    out = ["--res", "1k", "--out", str(tmp_path / "o.safetensors")]
    cases = {
        "lacks 1 tensors of the body": lambda state: state.pop("transformer_blocks.1.attn.to_q.weight"),
        "transformer_blocks.1 missing": lambda state: [state.pop(k) for k in list(state) if "_blocks.1." in k],
        "misshapen \\(context_embedder.weight": lambda state: state.update({"context_embedder.weight": torch.ones(3)}),
    }
    for number, (words, change) in enumerate(cases.items()):
        place = tmp_path / str(number)
        shutil.copytree(clean["flux"] / "transformer", place / "transformer")
        path = place / "transformer" / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)
        with pytest.raises(UserError, match=words):
            convert.main(["init", str(place), *out])
    place = tmp_path / "evil"
    shutil.copytree(clean["flux"], place)
    for part in ("transformer", "text_encoder", "tokenizer_2"):
        (place / part / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("transformer/config.json", CLIP, "tokenizer_2/tokenizer_config.json"):
        edit(name, auto_map={"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})(place)
    edit("transformer/config.json", _class_name="evil.Evil")(place)
    assert convert.main(["init", str(place), *out]) == 0 and load_text_encoders(place, "flux")
    assert not (tmp_path / "ran").exists()


def test_a_lora_of_the_source(clean, tmp_path):
    """Names are the source's, so its LoRAs fit; what only the latent model has is left out."""
    convert.main(
        ["init", str(clean["flux"]), "--res", "1k", "--head-width", "0.05", "--out", str(tmp_path / "i.safetensors")]
    )
    model = load_model(tmp_path / "i.safetensors", torch.float32)
    torch.manual_seed(7)
    key, shape = "single_transformer_blocks.1.proj_mlp", model.single_transformer_blocks[1].proj_mlp.weight.shape
    down, up = torch.randn(4, shape[1]), torch.randn(shape[0], 4)
    tensors = {f"transformer.{key}.lora_A.weight": down, f"transformer.{key}.lora_B.weight": up}
    tensors |= {
        "transformer.proj_out.lora_A.weight": torch.ones(4, 32),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 4),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    before = model.get_submodule(key).weight.detach().clone()
    load_lora(model, tmp_path / "lora.safetensors")
    torch.testing.assert_close(model.get_submodule(key).weight, before + up @ down)
