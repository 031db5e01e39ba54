"""init, merge and export: what is copied, what is new, and round trips bit for bit."""

import math
import subprocess
import sys

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from test_checkpoint import TINY, comfy, state_of, tiny

from l2p_fast import load_lora
from l2p_fast.convert import main
from l2p_fast.errors import UserError
from l2p_fast.formats.write import Piece, save_single_file, write_pieces
from l2p_fast.loading import load_model


def latent():
    torch.manual_seed(1)
    config = {key: value for key, value in TINY.items() if key != "head_width"}
    model = ZImageTransformer2DModel(**config | {"t_scale": 500.0})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture
def latent_folder(tmp_path):
    latent().to(torch.bfloat16).save_pretrained(tmp_path / "z" / "transformer", max_shard_size="200KB")
    (tmp_path / "z" / "model_index.json").write_text("{}")
    return tmp_path / "z"


@pytest.mark.parametrize("res, patch", [("1k", 16), ("4k", 64), ("8k", 128), ("10k", 160)])
def test_init_from_latent_folder(tmp_path, latent_folder, res, patch, capsys):
    out = tmp_path / "init.safetensors"
    assert main(["init", str(latent_folder), "--res", res, "--head-width", "0.125", "--out", str(out)]) == 0
    source, made = latent().to(torch.bfloat16).state_dict(), load_file(out)
    model = load_model(out)
    assert model.patch_size == patch and model.config.t_scale == 500.0 and model.config.head_width == 0.125
    new = [key for key in made if key not in source]
    assert all(key.startswith((f"all_x_embedder.{patch}-1.", "local_decoder.")) for key in new)
    assert all(torch.equal(made[key], source[key]) for key in made if key in source)
    bound = 1 / math.sqrt(3 * patch * patch)
    embedder = made[f"all_x_embedder.{patch}-1.weight"].float()
    assert 0.98 * bound < embedder.abs().max() <= 1.01 * bound and embedder.mean().abs() < 0.05 * bound
    text = capsys.readouterr().out
    assert f"new      {len(new):>5} tensors" in text and f"copied   {len(made) - len(new):>5} tensors" in text
    assert "skipped  " in text and "all_final_layer.2-1" in text


def test_init_seed(tmp_path, latent_folder):
    files = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        files.append(tmp_path / f"{name}.safetensors")
        main(["init", str(latent_folder), "--patch-size", "16", "--seed", str(seed), "--out", str(files[-1])])
    a, b, c = (file.read_bytes() for file in files)
    assert a == b and a != c
    x, z = load_file(files[0]), load_file(files[2])
    assert not torch.equal(x["local_decoder.enc1.0.bias"], z["local_decoder.enc1.0.bias"])
    assert torch.equal(x["layers.0.attention.to_q.weight"], z["layers.0.attention.to_q.weight"])


def test_init_from_a_single_latent_file_in_comfyui_names(tmp_path):
    state = state_of(latent())
    named = {key.replace("all_final_layer.2-1", "final_layer"): value for key, value in comfy(state).items()}
    save_file(named | {"norm_final.weight": torch.zeros(64)}, tmp_path / "z.safetensors")
    main(["init", str(tmp_path / "z.safetensors"), "--res", "1k", "--out", str(tmp_path / "o.safetensors")])
    made = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(made[key], state[key]) for key in made if key in state)
    assert load_model(tmp_path / "o.safetensors").patch_size == 16


@pytest.mark.parametrize("res, patch", [("8k", 128), ("10k", 160)])
def test_init_from_4k_by_equal_keys(tmp_path, res, patch, capsys):
    state = state_of(tiny(64))
    save_file(state, tmp_path / "4k.safetensors")
    main(["init", str(tmp_path / "4k.safetensors"), "--res", res, "--out", str(tmp_path / "o.safetensors")])
    made, wanted = load_file(tmp_path / "o.safetensors"), state_of(tiny(patch))
    equal = {key for key in wanted if key in state and state[key].shape == wanted[key].shape}
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], state[key]) for key in equal)
    assert "local_decoder.dec1.0.weight" in equal  # the head's inner levels are kept
    assert f"copied   {len(equal):>5} tensors" in capsys.readouterr().out
    assert load_model(tmp_path / "o.safetensors").patch_size == patch


def test_merge(tmp_path, capsys):
    base, trained = state_of(tiny()), state_of(tiny(seed=1), torch.float32)
    delta = {key: value for key, value in trained.items() if not key.startswith("layers.1.")}
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"pipe.dit.{key}": value for key, value in delta.items()}, tmp_path / "delta.safetensors")
    args = ["merge", str(tmp_path / "delta.safetensors"), "--base", str(tmp_path / "base.safetensors")]
    main([*args, "--out", str(tmp_path / "o.safetensors")])
    made = load_file(tmp_path / "o.safetensors")
    assert made.keys() == base.keys()
    for key, value in made.items():
        wanted = delta.get(key, base[key])
        assert value.dtype == wanted.dtype and torch.equal(value, wanted)
    assert f"new      {len(delta):>5} tensors" in capsys.readouterr().out
    main([*args, "--dtype", "bfloat16", "--out", str(tmp_path / "b.safetensors")])
    assert {value.dtype for value in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}


def test_merging_a_lora_is_loading_it(tmp_path):
    """Any kind of change, at any strength, streamed; exporting keeps a fused pair's rank and refuses other kinds."""
    base, path, out = (tmp_path / f"{name}.safetensors" for name in ("base", "lora", "out"))
    save_single_file(tiny(), base, dtype=torch.float32)
    stem, generator = "diffusion_model.layers.1.", torch.Generator().manual_seed(1)
    shapes = {
        "attention.qkv.lora_down.weight": (4, 64), "attention.qkv.lora_up.weight": (192, 4), "attention.qkv.alpha": (),
    }  # fmt: skip
    plain = {stem + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(plain, path)
    main(["export-lora", str(path), "--base", str(base), "--out", str(out)])
    pair = load_file(out)
    up, down = (pair[f"{stem}attention.qkv.lora_{x}.weight"] for x in "BA")
    torch.testing.assert_close(down, plain[f"{stem}attention.qkv.lora_down.weight"])
    alpha = plain[f"{stem}attention.qkv.alpha"]
    torch.testing.assert_close(up, plain[f"{stem}attention.qkv.lora_up.weight"] * alpha / 4)

    w1, w2, bias = (torch.randn(shape, generator=generator) for shape in ((2, 8), (85, 8), (256,)))
    more = {"feed_forward.w1.lokr_w1": w1, "feed_forward.w1.lokr_w2": w2, "adaLN_modulation.0.diff_b": bias}
    save_file(plain | {stem + name: value for name, value in more.items()}, path)
    main(["merge", str(path), "--base", str(base), "--scale", "0.5", "--overwrite", "--out", str(out)])
    wanted = load_model(base)
    load_lora(wanted, path, 0.5)
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, wanted.state_dict()[name], rtol=1e-5, atol=1e-5, msg=name)
    with pytest.raises(UserError, match="no plain low-rank pairs"):
        main(["export-lora", str(path), "--base", str(base), "--overwrite", "--out", str(out)])


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_round_trip_is_bit_exact(tmp_path, patch, prefix):
    state = {k: v.float() if k.startswith("layers.1.") else v for k, v in state_of(tiny(patch)).items()}
    a, b, c, d = (tmp_path / f"{x}.safetensors" for x in "abcd")
    save_file(state, a)
    main(["export", str(a), "--layout", "comfyui", "--prefix", prefix, "--out", str(b)])
    main(["export", str(b), "--out", str(c)])
    main(["export", str(c), "--layout", "comfyui", "--prefix", prefix, "--out", str(d)])
    between, made, wanted = load_file(b), load_file(c), comfy(state, prefix)
    assert between.keys() == wanted.keys()
    assert all(between[k].dtype == v.dtype and torch.equal(between[k], v) for k, v in wanted.items())
    assert made.keys() == state.keys()
    assert all(made[k].dtype == v.dtype and torch.equal(made[k], v) for k, v in state.items())
    assert b.read_bytes() == d.read_bytes()


def test_export_folder_keeps_what_shapes_do_not_tell(tmp_path):
    tiny(rope_grid=12).save_pretrained(tmp_path / "m", max_shard_size="300KB")
    main(["export", str(tmp_path / "m"), "--layout", "comfyui", "--out", str(tmp_path / "o.safetensors")])
    assert load_model(tmp_path / "o.safetensors").config.rope_grid == 12


def test_existing_output_needs_overwrite(tmp_path):
    save_file(state_of(tiny()), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"precious")
    args = ["export", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.safetensors")]
    with pytest.raises(UserError, match="--overwrite"):
        main(args)
    assert (tmp_path / "b.safetensors").read_bytes() == b"precious"
    assert main([*args, "--overwrite"]) == 0
    with pytest.raises(UserError, match="one of the files read"):
        main([*args[:2], "--out", str(tmp_path / "a.safetensors"), "--overwrite"])


def test_help_names_the_commands():
    done = subprocess.run([sys.executable, "-m", "l2p_fast.convert", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("init", "merge", "export", "examples:"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_merged(tmp_path, value):
    """Neither from a file, nor from tensors that a training hands over; nothing is left behind."""
    save_file(state_of(tiny()), tmp_path / "base.safetensors")
    trained = {"x_pad_token": torch.full((1, 64), value)}
    save_file(trained, tmp_path / "delta.safetensors")
    files = sorted(tmp_path.iterdir())
    args = ["merge", str(tmp_path / "delta.safetensors"), "--base", str(tmp_path / "base.safetensors")]
    with pytest.raises(UserError, match="NaN or infinite"):
        main([*args, "--out", str(tmp_path / "o.safetensors")])
    pieces = {"x_pad_token": Piece((1, 64), torch.float32, lambda dtype: iter([trained["x_pad_token"].to(dtype)]))}
    with pytest.raises(UserError, match="x_pad_token holds NaN or infinite values; nothing was written"):
        write_pieces(pieces, tmp_path / "o.safetensors")
    assert sorted(tmp_path.iterdir()) == files


def test_values_beyond_float16_are_never_written(tmp_path):
    with pytest.raises(UserError, match="beyond float16"):
        save_single_file({"x_pad_token": torch.full((1, 64), 1e6)}, tmp_path / "o.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_answered_before_torch_is_loaded(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"GGUF" + bytes(100))
    code = f"""
import sys
from l2p_fast.convert import main
try:
    main(["export", {str(tmp_path / "m.safetensors")!r}, "--out", {str(tmp_path / "o.safetensors")!r}])
except ValueError as error:
    print(error, "torch" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "GGUF" in said and said.strip().endswith("False")
