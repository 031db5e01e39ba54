"""The sample command: what it writes, that it repeats and resumes, and what it says to a wrong argument."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipeline import save_tiny

from l2p_fast import __version__, ops, sample
from l2p_fast.errors import UserError
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.formats.write import save_single_file
from l2p_fast.models import attention
from l2p_fast.sampling import facts, jobs, request, session
from l2p_fast.sampling.drawing import Drawing, read_settings, save_image
from l2p_fast.sampling.pipeline import L2PPipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_tiny(folder, dtype=torch.bfloat16, default_steps=2, default_guidance_scale=2.0)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


def test_a_picture_its_text_and_the_report(run, model, capsys):
    assert run("a red star", "--res", 32, "--seed", 7, "--out", "star.png", "--negative", "雾") == 0
    image = Image.open("star.png")
    assert image.size == (32, 32) and image.mode == "RGB"
    assert image.info["prompt"] == "a red star" and image.info["seed"] == "7" and image.info["negative"] == "雾"
    settings = json.loads(image.info["l2p_fast"])
    dtype = "bfloat16" if ops.cpu_has_fast_bf16() else "float32"  # the checkpoint's own, but where it is slow
    wanted = {"steps": 2, "guidance": 2.0, "shift": 3.0, "dtype": dtype, "cfg_batch": "on", "version": __version__}
    assert settings.items() >= wanted.items() and settings["model"] == str(model)
    said = capsys.readouterr()
    for word in ("patch 16", "cpu (", dtype, "native", "extension", "head  ", "s a step", "peak memory", "star.png"):
        assert word in said.out
    assert "it/s" not in said.err  # no bar where there is no terminal
    assert list(Path().iterdir()) == [Path("star.png")]


def test_a_dry_run_tells_what_the_weights_take(run, model, capsys):
    """The weights as counted are those that are then held; nothing is drawn."""
    from l2p_fast.loading import load_model

    assert run("a red star", "--res", 32, "--dtype", "fp32", "--dry-run") == 0
    said = capsys.readouterr().out
    held = sum(p.nbytes for p in load_model(model / "transformer", torch.float32).parameters())
    assert f"weights           {held / 1e9:>9.2f} GB" in said and "32x32 on cpu" in said
    for word in ("text encoder", "images", "working", "total"):
        assert word in said
    assert not list(Path().iterdir())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_from_image_repeats_pixel_for_pixel(run, suffix):
    how = ("--steps", 3, "--guidance", 3.5, "--guidance-interval", "0.8,1")
    run("a blue ring", "--height", 32, "--width", 48, *how, "--out", f"one{suffix}")
    with pytest.raises(UserError, match="names --model .*; add these options, or --trust"):
        run("--from-image", f"one{suffix}", "--out", f"two{suffix}", model=None)
    assert run("--from-image", f"one{suffix}", "--trust", "--out", f"two{suffix}", model=None) == 0
    assert np.array_equal(pixels(f"one{suffix}"), pixels(f"two{suffix}"))
    assert Image.open(f"two{suffix}").size == (48, 32)
    run("--from-image", f"one{suffix}", "--guidance-interval", "0,1", "--out", f"full{suffix}")
    told = [read_settings("image", f"{name}{suffix}")["guidance_interval"] for name in ("one", "two", "full")]
    assert told == ["0.8,1", "0.8,1", "0,1"]
    run("--from-image", f"one{suffix}", "--seed", 5, "--res", 16, "--out", f"three{suffix}")
    assert Image.open(f"three{suffix}").size == (16, 16)


def test_a_picture_is_the_same_alone_and_among_many(run):
    run("a star", "--res", 32, "--seed", 3, "--num-images", 2, "--out", "many")
    run("a star", "--res", 32, "--seed", 4, "--out", "alone.png")
    assert sorted(p.name for p in Path("many").iterdir()) == ["0000-a-star-0.png", "0000-a-star-1.png"]
    assert np.array_equal(pixels("many/0000-a-star-1.png"), pixels("alone.png"))
    assert not np.array_equal(pixels("many/0000-a-star-0.png"), pixels("alone.png"))


def test_default_names(run):
    run("Eine rote/Kugel!", "--res", 16, "--seed", 1)
    assert Path("eine-rote-kugel-1.png").exists()
    Path("folder").mkdir()
    run("a", "--res", 16, "--seed", 2, "--out", "folder", "--format", "webp")
    assert Path("folder/a-2.webp").exists()


def test_a_prompts_file_goes_on_where_it_was_interrupted(run, monkeypatch, capsys):
    Path("prompts.txt").write_text("a red star\n\na blue ring\n两个圆\n", encoding="utf-8")
    argv = ("--prompts-file", "prompts.txt", "--res", 16, "--seed", 1, "--out", "out")
    save, saved = Drawing.save, []

    def interrupted(*args):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(args[1])
        save(*args)

    monkeypatch.setattr(Drawing, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*argv)
    out = Path("out")
    first = out / "0000-a-red-star.png"
    assert list(Path("out").iterdir()) == [first]
    stamp = first.stat().st_mtime_ns
    monkeypatch.setattr(Drawing, "save", save)
    assert run(*argv) == 0
    assert "1 of 3 images are finished and skipped" in capsys.readouterr().out
    names = ["0000-a-red-star.png", "0001-a-blue-ring.png", "0002-两个圆.png"]
    assert sorted(p.name for p in Path("out").iterdir()) == names and first.stat().st_mtime_ns == stamp
    assert [Image.open(Path("out") / name).info["seed"] for name in names] == ["1", "2", "3"]
    Path(out / names[0]).write_bytes(b"")  # nothing was drawn here
    capsys.readouterr()
    assert run(*argv) == 0
    assert "2 of 3 images are finished and skipped" in capsys.readouterr().out and pixels(out / names[0]).any()
    assert run(*argv, "--steps", 1) == 0  # what was asked for has changed, and the names have not
    assert [json.loads(Image.open(out / name).info["l2p_fast"])["steps"] for name in names] == [1, 1, 1]
    monkeypatch.setattr(session.Session, "load", lambda *a: pytest.fail("nothing is left to do"))
    assert run(*argv, "--steps", 1) == 0
    assert run(*argv[:4], "--out", "out") == 0  # no seed was asked for: those that were drawn will do


def test_a_failed_write_leaves_the_old_picture(run, monkeypatch):
    run("a", "--res", 16, "--out", "a.png")
    before = Path("a.png").read_bytes()
    save = Image.Image.save

    def full(self, path, **options):
        save(self, path, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        run("b", "--res", 16, "--out", "a.png")
    assert Path("a.png").read_bytes() == before and list(Path().iterdir()) == [Path("a.png")]


def lora_file(path, **pairs):
    """Random pairs for the bundled model, whose images show what they change, in diffusers' names."""
    generator, file = torch.Generator().manual_seed(1), {}
    for module in ("layers.0.attention.to_v", "layers.1.feed_forward.w2", "noise_refiner.0.adaLN_modulation.0"):
        rows, columns = Checkpoint(facts.WEIGHTS / "tiny-1k").shapes[f"{module}.weight"]
        for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
            value = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            file[f"transformer.{module}.lora_{part}.weight"] = value
    save_file(file | pairs, path)


def test_loras(run, capsys):
    """Fused or over 8 bits, several add up; the image holds their names and digests, and repeats with them alone."""
    asked = "a red star", "--res", 32, "--seed", 3, "--dtype", "fp32", "--steps", 2
    run = functools.partial(run, model=None)
    lora_file("one.safetensors")
    run(*asked, "--out", "plain.png")
    run(*asked, "--lora", "one.safetensors:0.5", "--out", "half.png")
    assert "one.safetensors:0.5 (3 layers fused, 0 as adapters)" in capsys.readouterr().out
    run(*asked, "--lora", "one.safetensors:0.25", "--lora", "one.safetensors:0.25", "--out", "twice.png")
    half, twice, plain = (pixels(f"{name}.png").astype(int) for name in ("half", "twice", "plain"))
    assert abs(half - twice).max() <= 1 < abs(half - plain).max()
    digest = hashlib.sha256(Path("one.safetensors").read_bytes()).hexdigest()
    settings = json.loads(Image.open("half.png").info["l2p_fast"])
    assert settings["lora"] == [{"file": "one.safetensors", "scale": 0.5, "sha256": digest}]

    with pytest.raises(UserError, match="names --lora 'one.safetensors:0.5'; add these options, or --trust"):
        run("--from-image", "half.png", "--out", "again.png")
    run("--from-image", "half.png", "--trust", "--out", "again.png")
    assert np.array_equal(pixels("half.png"), pixels("again.png"))
    lora_file("one.safetensors", more=torch.zeros(1))
    with pytest.raises(UserError, match="one.safetensors has changed since"):
        run("--from-image", "half.png", "--trust", "--out", "again.png")

    capsys.readouterr()
    run(*asked, "--quantize", "int8", "--lora", "one.safetensors:0.5", "--out", "half8.png")
    assert (
        "one.safetensors:0.5 (1 layers fused, 2 as adapters)" in capsys.readouterr().out
    )  # the timestep's layer is not in 8 bits
    half8 = pixels("half8.png").astype(int)
    assert abs(half8 - half).mean() < 0.5 * abs(half - plain).mean()


@pytest.mark.parametrize(("file", "words"), [
    ("gone.safetensors", "--lora gone.safetensors does not exist"),
    ("model.safetensors", "--lora model.safetensors is not a LoRA"),
    ("bad.safetensors", "--lora can't be used: bad.safetensors"),
    ("ok.safetensors:1e9", "--lora has a scale from"),
])  # fmt: skip
def test_loras_that_are_none(run, monkeypatch, file, words):
    save_file({"layers.0.attention.to_q.weight": torch.zeros(2, 2)}, "model.safetensors")
    Path("bad.safetensors").write_bytes(b"no")
    monkeypatch.setattr(session.Session, "load", lambda *_: pytest.fail("loaded before it was checked"))
    with pytest.raises(UserError, match=words):
        run("a", "--res", 32, "--lora", file)


def test_image_to_image(run):
    Image.new("RGB", (40, 30), "red").save("red.png")
    run("a", "--image", "red.png", "--strength", 0.5, "--steps", 4, "--out", "a.png")
    assert Image.open("a.png").size == (48, 32) or Image.open("a.png").size == (32, 32)
    with pytest.raises(UserError, match="names --image 'red.png'"):
        run("--from-image", "a.png", "--out", "b.png")
    run("--from-image", "a.png", "--trust", "--out", "b.png", model=None)
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    Image.new("RGB", (40, 30), "blue").save("red.png")
    with pytest.raises(UserError, match="red.png has changed"):
        run("--from-image", "a.png", "--trust", "--out", "b.png", model=None)


def test_bundled_models_are_chosen_by_size(run, tmp_path, monkeypatch, model):
    monkeypatch.setattr(facts, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(UserError, match="--model tiny-1k is bundled, but not installed"):
        run("a", "--res", 32, model=None)
    save_tiny(tmp_path / "weights" / "tiny-1k", 16)
    save_tiny(tmp_path / "weights" / "tiny-4k", 64)
    found = [facts.find_model(None, size) for size in (None, 1024, 2047, 2048, 8192)]
    assert [model_facts.name for model_facts in found] == ["tiny-1k", "tiny-1k", "tiny-1k", "tiny-4k", "tiny-4k"]
    assert [model_facts.patch_size for model_facts in found] == [16, 16, 16, 64, 64]
    assert facts.find_model("tiny-4k").size_multiple == 64
    with pytest.raises(UserError, match="--res must be a multiple of 64 .* got 2064; try 2048 or 2112"):
        run("a", "--res", 2064, model=None)
    run("a", "--res", 16, "--steps", 1, "--out", "a.png", model=None)
    assert json.loads(Image.open("a.png").info["l2p_fast"])["model"] == "tiny-1k"


def test_single_file_with_a_text_encoder(run, model):
    save_single_file(L2PPipeline.from_pretrained(model).transformer, "one.safetensors", layout="published")
    found = facts.find_model("one.safetensors")
    assert found.patch_size == 16 and not found.is_pipeline
    with pytest.raises(UserError, match="holds no text encoder; add --text-encoder"):
        run("a", "--res", 32, model="one.safetensors")
    argv = ("a", "--res", 32, "--seed", 1, "--steps", 2, "--guidance", 2, "--dtype", "bf16")
    run(*argv, "--text-encoder", model, "--out", "file.png", model="one.safetensors")
    run(*argv, "--out", "folder.png")
    assert np.array_equal(pixels("file.png"), pixels("folder.png"))


def test_options_reach_the_model(run, capsys):
    argv = ("a", "--res", 32, "--seed", 1, "--head-memory-mb", 8, "--cfg-batch", "off", "--dtype", "fp32")
    run(*argv, "--attention", "_native_math", "--coarse-size", 0, "--out", "a.png")
    settings = json.loads(Image.open("a.png").info["l2p_fast"])
    wanted = {"head_memory_mb": 8.0, "cfg_batch": "off", "dtype": "float32", "attention": "_native_math"}
    assert settings.items() >= wanted.items()
    assert "attention  _native_math; ragged batches row by row" in capsys.readouterr().out
    run("a", "--res", 32, "--out", "b.png")
    assert "attention  native" in capsys.readouterr().out  # the choice did not outlive its run


def test_coarse_start_is_timed_by_stage(run, capsys):
    run("a", "--res", 64, "--steps", 4, "--coarse-size", 1, "--out", "a.png")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a.png"))
    assert "coarse " in line and "s a step x 4, full " in line


def test_out_of_memory_is_a_line(run, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(L2PPipeline, "__call__", fail)
    with pytest.raises(UserError, match="too little memory for 32x32; try --offload model"):
        run("a", "--res", 32)


WRONG = [
    ([], "what to draw"),
    (["  "], "prompt is empty"),
    (["a", "--res", "1000"], "--res must be a multiple of 16 .* got 1000; try 992 or 1008"),
    (["a", "--height", "8", "--width", "32"], "--height must be a multiple of 16 .* try 16"),
    (["a", "--res", "32", "--width", "32"], "not both"),
    (["a", "--res", "-32"], "--res must be at least 1"),
    (["a", "--res", "big"], "invalid int value"),
    (["a", "--steps", "0"], "--steps must be at least 1, got 0; try 1"),
    (["a", "--steps", "-3"], "--steps must be at least 1"),
    (["a", "--num-images", "0"], "--num-images must be at least 1"),
    (["a", "--seed", "-1"], "--seed must be at least 0"),
    (["a", "--seed", str(2**64)], "below 2\\^63"),
    (["a", "--guidance", "-0.5"], "--guidance must be at least 0 .* try 1"),
    (["a", "--guidance", "nan"], "--guidance"),
    (["a", "--shift", "0"], "--shift must be above 0, got 0.0; try 3"),
    (["a", "--head-memory-mb", "-1"], "--head-memory-mb must be above 0"),
    (["a", "--coarse-strength", "2"], "--coarse-strength .* try 1"),
    (["a", "--image", "in.png", "--strength", "1.5"], "--strength must be above 0 and at most 1, got 1.5; try 1"),
    (["a", "--strength", "0.5"], "no effect without --image"),
    (["a", "--image", "im.png"], "im.png does not exist; did you mean in.png"),
    (["a", "--image", "note.txt"], "note.txt is not a readable image"),
    (["a", "--image", "cut.png"], "cut.png is not a readable image"),
    (["a", "--dtype", "bf61"], "--dtype has the unknown value 'bf61'; try bf16"),
    (["a", "--format", "gif"], "--format"),
    (["a", "--attention", "natve"], "unknown value 'natve'; try native"),
    (["a", "--attention", "xformers"], "needs the package xformers: pip install xformers"),
    (["a", "--device", "gpu"], "--device must be auto, cpu, cuda"),
    (["a", "--offload", "sequental"], "try sequential"),
    (["a", "--offload", "model", "--device", "cpu"], "needs a GPU"),
    (["a", "--out", "star.bmp"], "'star.bmp'; try star.png"),
    (["a", "--out", "star.png", "--format", "jpg"], "does not fit --format jpg; try star.jpg"),
    (["a", "--out", "note.txt/star.png"], "is not a folder"),
    (["a", "--num-images", "2", "--out", "star.png"], "must be a folder for several images, got star.png; try star"),
    (["a", "--num-images", "2", "--out", "note"], "is a file"),
    (["a", "--res", "16384", "--format", "webp"], "at most 16383 pixels a side"),
    (["a", "--prompts-file", "note.txt"], "not both"),
    (["--prompts-file", "empty.txt"], "empty.txt is empty"),
    (["--prompts-file", "notes.txt"], "did you mean note.txt"),
    (["--prompts-file", "in.png"], "not UTF-8"),
    (["--from-image", "in.png"], "holds no settings"),
    (["--from-image", "damaged.png"], "damaged .steps is 'many', not int"),
    (["--from-image", "none.png"], "does not exist"),
    (["a", "--model", "nothing"], "--model nothing does not exist"),
    (["a", "--text-encoder", "no such"], "neither a folder nor a hub id"),
    (["a", "--text-encoder", "."], "has no folder text_encoder"),
    (["a", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG)
def test_wrong_arguments_are_answered_before_anything_is_loaded(model, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.Session, "load", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    Image.new("RGB", (32, 32)).save("in.png")
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noisy.save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:5000])
    settings = {"prompt": "a", "negative": "", "seed": 1, "steps": "many"}
    save_image(Image.new("RGB", (8, 8)), Path("damaged.png"), "png", settings)
    Path("note.txt").write_text("a prompt")
    Path("note").write_text("")
    Path("empty.txt").write_text("\n \n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words) as caught:
        sample.main([*argv, *([] if "--model" in argv else ["--model", str(model)])])
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_unwritable_folder(run, monkeypatch):
    monkeypatch.setattr(jobs.os, "access", lambda *a: False)  # root may write anywhere
    with pytest.raises(UserError, match="no permission in .*; choose another folder"):
        run("a", "--res", 16, "--out", "sub/star.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_absent_gpu(run):
    with pytest.raises(UserError, match="--device cuda: torch .* sees none; try --device cpu"):
        run("a", "--res", 16, "--device", "cuda")
    with pytest.raises(UserError, match="--offload model needs a GPU, and torch sees none"):
        run("a", "--res", 16, "--offload", "model")


def test_a_damaged_model_is_a_line(run, tmp_path):
    Path("bad.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UserError):
        run("a", "--res", 16, "--text-encoder", "some/repo", model="bad.safetensors")


def test_options_default_to_none_and_all_settings_are_options():
    args = vars(sample.build_parser().parse_args([]))
    assert {*request.Request.field_names(), *request.Setup.field_names()} - {"image_sha256", "mask_sha256"} <= set(args)
    assert all(value is None for name, value in args.items() if name not in ("dry_run", "no_progress"))
    assert isinstance(sample.build_parser(), argparse.ArgumentParser)


def test_a_mistake_costs_no_import_of_torch_and_exits_with_2():
    code = (
        "import sys\nfrom l2p_fast.errors import run_cli\nfrom l2p_fast.sample import main\n"
        "try:\n    run_cli(lambda: main(['a', '--steps', '-1']))\n"
        "finally:\n    assert not {'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & set(sys.modules)"
    )
    root = Path(sample.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stderr == "error: --steps must be at least 1, got -1; try 1\n"
