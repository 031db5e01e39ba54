"""Bad files through the command line: one clear line, what and what to do, exit code 2, nothing written."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import comfy, state_of, tiny
from test_convert import latent

from l2p_fast.convert import main
from l2p_fast.errors import run_cli

KEY = "layers.1.feed_forward.w1.weight"


def save(folder, state, name="m.safetensors"):
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return folder / name


@functools.cache
def made():
    return state_of(tiny())


def good():
    return {key: value.clone() for key, value in made().items()}


def raw(content):
    def make(folder):
        (folder / "m.safetensors").write_bytes(content)
        return folder / "m.safetensors"

    return make


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(len(text).to_bytes(8, "little") + text + data)


def changed(*drop, **add):
    """A good checkpoint without the keys ``drop`` and with ``add`` (dots written as __)."""

    def make(folder):
        state = {key: value for key, value in good().items() if key not in drop}
        return save(folder, state | {key.replace("__", "."): value for key, value in add.items()})

    return make


def truncated(folder):
    path = save(folder, good())
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def truncated_header(folder):
    path = save(folder, good())
    path.write_bytes(path.read_bytes()[:500])
    return path


def trailing(folder):
    path = save(folder, good())
    path.write_bytes(path.read_bytes() + b"more")
    return path


def pickle(folder):
    torch.save(good(), folder / "m.pt")
    return folder / "m.pt"


def old_pickle(folder):
    torch.save({"a": torch.zeros(3)}, folder / "m.safetensors", _use_new_zipfile_serialization=False)
    return folder / "m.safetensors"


def pickle_folder(folder):
    torch.save(good(), folder / "pytorch_model.bin")
    return folder


def with_value(value):
    def make(folder):
        state = good()
        state[KEY][5, 7] = value
        return save(folder, state)

    return make


def latent_file(folder):
    return save(folder, state_of(latent()))


def latent_comfyui(folder):
    state = comfy(state_of(latent()))
    return save(folder, {key.replace("all_final_layer.2-1", "final_layer"): value for key, value in state.items()})


def delta(folder):
    return save(folder, {key: value for key, value in good().items() if not key.startswith("layers.1.")})


def head_only(folder):
    return save(folder, {key: value for key, value in good().items() if key.startswith("local_decoder.")})


def lora(folder):
    return save(folder, {f"layers.0.attention.to_q.lora_{x}.weight": torch.zeros(4, 64) for x in "AB"})


def other_model(folder):
    return save(folder, {"model.embed_tokens.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(4, 4)})


def empty_folder(folder):
    (folder / "config.json").write_text("{}")
    return folder


def two_checkpoints(folder):
    save(folder, good(), "a.safetensors")
    save(folder, good(), "b.safetensors")
    return folder


def sharded(folder):
    tiny().save_pretrained(folder, max_shard_size="300KB")
    return sorted(folder.glob("*.safetensors")), next(folder.glob("*.index.json"))


def missing_shard(folder):
    sharded(folder)[0][1].unlink()
    return folder


def missing_shard_without_index(folder):
    shards, index = sharded(folder)
    index.unlink()
    shards[1].unlink()
    return folder


def lone_shard(folder):
    return sharded(folder)[0][0]


def index_names_absent_key(folder):
    shards, index = sharded(folder)
    names = json.loads(index.read_text())
    names["weight_map"]["layers.9.extra.weight"] = shards[0].name
    index.write_text(json.dumps(names))
    return folder


def index_no_json(folder):
    sharded(folder)[1].write_text("{not json")
    return folder


def duplicate_over_shards(folder):
    state = good()
    save(folder, state, "m-00001-of-00002.safetensors")
    save(folder, {KEY: state[KEY]}, "m-00002-of-00002.safetensors")
    return folder


def duplicate_layouts(folder):
    state = good()
    return save(folder, state | {"layers.0.attention.q_norm.weight": state["layers.0.attention.norm_q.weight"].clone()})


def quantized(note=None, scale=None, dtype=torch.int8, **extra):
    def make(folder):
        state, base = good(), KEY.removesuffix("weight")
        if dtype is not None:
            state[KEY] = torch.ones(state[KEY].shape).to(dtype)
        else:
            del state[KEY]
        if scale is not None:
            state[base + "weight_scale"] = scale
        if note is not None:
            state[base + "comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
        return save(folder, state)

    return make


def renamed_keys(change):
    """A good checkpoint with its header's text changed by ``change``; lengths of names stay."""

    def make(folder):
        path = save(folder, good())
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length])
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        return path

    return make


def bombed(header):
    """A sparse file whose header claims much; nothing of it is on the disk."""

    def make(folder):
        path = folder / "m.safetensors"
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(1 << 33)
        return path

    return make


def of_config(**config):
    """A folder whose config.json says ``config``."""

    def make(folder):
        save(folder, good())
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def of_metadata(text):
    def make(folder):
        save_file(good(), folder / "m.safetensors", {"l2p_config": text})
        return folder / "m.safetensors"

    return make


def index_to(name):
    def make(folder):
        _, index = sharded(folder)
        names = json.loads(index.read_text())
        names["weight_map"]["x_pad_token"] = name
        index.write_text(json.dumps(names))
        return folder

    return make


def many_blocks(folder):
    state = {f"layers.{i}.attention.norm_q.weight": torch.zeros(32) for i in range(3, 1500)}
    return save(folder, good() | state)


def entry(dtype="F32", shape=(1,), offsets=(0, 4), name="a"):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def fifo_in_a_folder(folder):
    os.mkfifo(folder / "m.safetensors")
    return folder


def config_fifo(folder):
    save(folder, good())
    os.mkfifo(folder / "config.json")
    return folder


def unreadable(folder):
    path = save(folder, good())
    path.chmod(0)
    return path


def unreadable_folder(folder):
    (folder / "closed").mkdir(mode=0)
    return folder / "closed"


def fifo(folder):
    os.mkfifo(folder / "m.safetensors")
    return folder / "m.safetensors"


ONE = torch.ones(())
# name -> (what makes the bad file, what the line must say)
CASES = {
    "absent": (lambda folder: folder / "none.safetensors", "does not exist"),
    "empty": (raw(b""), "is empty"),
    "a few bytes": (raw(b"abc"), "not a safetensors file"),
    "wrong magic": (raw(b"\x89PNG\r\n\x1a\n" * 40), "not a safetensors file"),
    "web page": (raw(b"<!DOCTYPE html><html></html>"), "a web page"),
    "lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    "gguf": (raw(b"GGUF" + bytes(100)), "GGUF"),
    "pickle": (pickle, "a pickle"),
    "old pickle named safetensors": (old_pickle, "a pickle"),
    "pickles in a folder": (pickle_folder, "only pickles"),
    "truncated": (truncated, "is truncated"),
    "truncated header": (truncated_header, "ends inside its header"),
    "trailing bytes": (trailing, "longer than its header"),
    "header no json": (with_header(b'{"a": nonsense}'), "damaged header"),
    "header without offsets": (with_header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "damaged header"),
    "header with odd offsets": (
        with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "damaged header",
    ),
    "header twice": (
        with_header(b'{"a":%b,"a":%b}' % ((b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}',) * 2), bytes(8)),
        "twice",
    ),
    "header without tensors": (with_header(b"{}"), "no tensors"),
    "unknown dtype": (with_header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)), "F4"),
    "folder without weights": (empty_folder, "no .safetensors file"),
    "folder with two": (two_checkpoints, "several checkpoints"),
    "missing shard": (missing_shard, "-00002-of-"),
    "missing shard, no index": (missing_shard_without_index, "lacks shard 2 of"),
    "lone shard": (lone_shard, "is shard 1 of"),
    "index names an absent key": (index_names_absent_key, "layers.9.extra.weight"),
    "index no json": (index_no_json, "not valid JSON"),
    "duplicate over shards": (duplicate_over_shards, "in both"),
    "duplicate over layouts": (duplicate_layouts, "norm_q.weight twice"),
    "missing key": (changed(KEY), f"1 missing ({KEY})"),
    "missing sizes": (changed("cap_embedder.0.weight"), "cap_embedder.0.weight"),
    "missing head level": (changed("local_decoder.dec2.0.weight", "local_decoder.dec2.0.bias"), "2 missing"),
    "extra key": (changed(layers__1__surprise=torch.zeros(2)), "1 unexpected (layers.1.surprise)"),
    "misshapen key": (changed(t_embedder__mlp__0__bias=torch.zeros(5)), "t_embedder.mlp.0.bias [5] instead of [1024]"),
    "nan": (with_value(torch.nan), "NaN or infinite"),
    "inf": (with_value(-torch.inf), "NaN or infinite"),
    "latent": (latent_file, "convert init"),
    "latent in comfyui names": (latent_comfyui, "convert init"),
    "training delta": (delta, "convert merge"),
    "head only": (head_only, "convert merge"),
    "lora": (lora, "load_lora"),
    "another model": (other_model, "lm_head.weight"),
    "int8 without scale": (quantized(), "without its weight_scale"),
    "scale without weight": (quantized(scale=ONE, dtype=None), "without its weight"),
    "scale on bf16": (quantized(scale=ONE, dtype=torch.bfloat16), "has a scale"),
    "scale of a wrong shape": (quantized(scale=torch.ones(7)), "[7]"),
    "nan scale": (quantized(scale=ONE * torch.nan), "NaN or infinite"),
    "unknown quantization": (quantized('{"format": "nvfp4"}', ONE), "'nvfp4'"),
    "quantization with an unknown option": (quantized('{"format": "int8_tensorwise", "blocks": 64}', ONE), "blocks"),
    "quantization that is another": (quantized('{"format": "float8_e4m3fn"}', ONE), "note says float8_e4m3fn"),
    "quantization note no json": (quantized("int8", ONE), "not JSON"),
    "quantization note of 1 MB": (quantized("x" * (1 << 20), ONE), "which is no note"),
    "quantization note nested deeply": (quantized("[" * 60_000, ONE), "nested too deeply"),
    "rotation of no group": (quantized('{"convrot": true, "convrot_groupsize": 0}', ONE), "has quantization"),
    "rotation of a negative group": (quantized('{"convrot": true, "convrot_groupsize": -4}', ONE), "has quantization"),
    "rotation of text": (quantized('{"convrot": true, "convrot_groupsize": "16"}', ONE), "has quantization"),
    "rotation of infinity": (quantized('{"convrot": true, "convrot_groupsize": 1e999}', ONE), "has quantization"),
    "a layer far away": (changed(**{"layers__99999999__surprise": torch.zeros(2)}), "training output"),
    "a refiner far away": (
        changed(**{"noise_refiner__99999999__surprise": torch.zeros(2)}), "noise_refiner.99999999 is there",
    ),
    "a layer of 200 digits": (changed(**{f"layers__{'9' * 200}__x": torch.zeros(2)}), "training output"),
    "too many layers": (many_blocks, "more than any model's"),
    "patch of 999 digits": (changed(**{f"all_x_embedder__{'9' * 99}-1__weight": torch.zeros(2, 2)}), "unexpected"),
    "an unknown patch": (
        renamed_keys(lambda text: text.replace(b"all_x_embedder.16-1", b"all_x_embedder.17-1")), "patches of 17",
    ),
    "patch 0": (renamed_keys(lambda text: text.replace(b"embedder.16-1", b"embedder.00-1")), "missing"),
    "NUL in a name": (
        renamed_keys(lambda text: text.replace(b"x_pad_token", b"x_pad\\u0000ok")), "not a tensor's name",
    ),
    "half a letter in a name": (
        renamed_keys(lambda text: text.replace(b"x_pad_token", b"x_pad\\ud800ok")), "not a tensor's name",
    ),
    "a name of 10,000 letters": (with_header(entry(name="a" * 10_000), bytes(4)), "not a tensor's name"),
    "header no UTF-8": (renamed_keys(lambda text: text.replace(b"x_pad", b"x_\xff\xfed")), "damaged header"),
    "header nested deeply": (with_header(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "header a list": (with_header(b"{}".replace(b"{}", b'{"__metadata__": []}')), "__metadata__"),
    "header of 1 GB": (bombed(b"{" + b" " * 100), "damaged header"),
    "header longer than any": (raw((1 << 29).to_bytes(8, "little") + b"{" + bytes(100)), "ends inside its header"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}} | entry(), bytes(4)), "__metadata__"),
    "shape too large": (with_header(entry(shape=[1 << 62, 1 << 62]), bytes(4)), "can't lie at"),
    "shape of nothing, large": (with_header(entry(shape=[0, 1 << 62], offsets=(0, 0))), "not a whole L2P"),
    "shape negative": (with_header(entry(shape=[-1]), bytes(4)), "damaged header"),
    "shape of fractions": (with_header(entry(shape=[1.5]), bytes(4)), "damaged header"),
    "shape of truth": (with_header(entry(shape=[True]), bytes(4)), "damaged header"),
    "shape infinite": (
        with_header(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', bytes(4)), "damaged header",
    ),
    "shape of 5000 digits": (
        with_header(b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}' % (b"9" * 5000), bytes(4)), "damaged",
    ),
    "shape of 100 dimensions": (with_header(entry(shape=[1] * 100), bytes(4)), "100 dimensions"),
    "offsets overlap": (
        with_header(entry() | entry(name="b"), bytes(4)), "can't lie at",
    ),
    "offsets beyond the file": (with_header(entry(shape=[1 << 40], offsets=(0, 1 << 42)), bytes(4)), "truncated"),
    "dtype no text": (with_header(entry(dtype=["F32"]), bytes(4)), "damaged header"),
    "config nested deeply": (
        lambda folder: save(folder, good()) and (folder / "config.json").write_text("[" * 100_000) and folder,
        "nested too deeply",
    ),
    "config too long": (
        lambda folder: save(folder, good()) and (folder / "config.json").write_text(" " * (2 << 20)) and folder,
        "over 1 MB",
    ),
    "config no object": (
        lambda folder: save(folder, good()) and (folder / "config.json").write_text("[]") and folder,
        "not a JSON object",
    ),
    "config a fifo": (config_fifo, "is not a file"),
    "config: rope_grid out of range": (of_config(rope_grid=10**30), "rope_grid must be"),
    "config: rope_grid of truth": (of_config(rope_grid=True), "rope_grid must be"),
    "config: t_scale of text": (of_config(t_scale="1000"), "t_scale must be"),
    "config: rope_theta negative": (of_config(rope_theta=-256.0), "rope_theta must be"),
    "config: norm_eps too large": (of_config(norm_eps=1e300), "norm_eps must be"),
    "config: axes_lens too long": (of_config(axes_lens=[1] * 1000), "axes_lens must be"),
    "config: axes_dims of lists": (of_config(axes_dims=[[1], [2], [3]]), "axes_dims must be"),
    "metadata: config damaged": (of_metadata("{"), "metadata is damaged"),
    "metadata: config a list": (of_metadata("[]"), "metadata is damaged"),
    "metadata: config nested deeply": (of_metadata("[" * 100_000), "metadata is damaged"),
    "metadata: rope_grid out of range": (of_metadata('{"rope_grid": -1}'), "rope_grid must be"),
    "index leads out of the folder": (index_to("../../etc/passwd.safetensors"), "not a .safetensors file beside it"),
    "index leads to the root": (index_to("/etc/m.safetensors"), "not a .safetensors file beside it"),
    "index names a pickle": (index_to("pytorch_model.bin"), "not a .safetensors file beside it"),
    "index with NUL": (index_to("a\0.safetensors"), "not a .safetensors file beside it"),
    "a fifo in a folder": (fifo_in_a_folder, "no .safetensors file"),
    "unreadable": (unreadable, "can't read"),
    "unreadable folder": (unreadable_folder, "can't read"),
    "a fifo": (fifo, "neither a file nor a folder"),
}  # fmt: skip


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check(code, err, out, folder, before, words):
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert words in err, err
    assert len(err) < 500
    assert out == ""
    assert listing(folder) == before


@pytest.mark.parametrize("case", CASES)
def test_bad_source(tmp_path, case, capsys):
    make, words = CASES[case]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    if case.startswith("unreadable") and os.access(source, os.R_OK):
        pytest.skip("this user reads every file")
    before = listing(tmp_path)
    argv = ["export", str(source), "--layout", "comfyui", "--out", str(tmp_path / "out.safetensors")]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(argv))
    shown = capsys.readouterr()
    check(stop.value.code, shown.err, shown.out, tmp_path, before, words)


@pytest.mark.parametrize("case", ["pickle", "nan", "latent"])
def test_bad_source_in_a_process(tmp_path, case):
    make, words = CASES[case]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    before = listing(tmp_path)
    argv = [sys.executable, "-m", "l2p_fast.convert", "export", str(source), "--out", str(tmp_path / "out.safetensors")]
    done = subprocess.run(argv, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    check(done.returncode, lines[0] + "\n", done.stdout, tmp_path, before, words)


def bad_delta(state):
    return lambda folder: ["merge", save(folder, state, "d.safetensors"), "--base", save(folder, good())]


COMMANDS = {
    "merge: unknown key": (bad_delta({"layers.9.x.weight": torch.zeros(2)}), "1 tensors are not in the base"),
    "merge: other shape": (bad_delta({KEY: torch.zeros(2, 2)}), "[2, 2] instead of"),
    "merge: other patch": (
        bad_delta({"all_x_embedder.64-1.bias": torch.zeros(64)}), "same patch size",
    ),
    "merge: a broken lora": (
        lambda folder: ["merge", lora(folder), "--base", save(folder, good(), "b.safetensors")], "don't fit each other",
    ),
    "merge: base is latent": (
        lambda folder: ["merge", save(folder, {KEY: torch.zeros(2)}, "d.safetensors"), "--base", latent_file(folder)],
        "convert init",
    ),
    "merge: base is a delta": (
        lambda folder: ["merge", save(folder, {KEY: torch.zeros(2)}, "d.safetensors"), "--base", delta(folder)],
        "convert merge",
    ),
    "init: a delta": (lambda folder: ["init", delta(folder), "--res", "4k"], "convert merge"),
    "init: body incomplete": (lambda folder: ["init", changed(KEY)(folder), "--res", "4k"], "lacks 1 tensors"),
    "init: head width": (lambda folder: ["init", delta(folder), "--res", "1k", "--head-width", "0"], "--head-width"),
    "export: prefix": (
        lambda folder: ["export", changed()(folder), "--layout", "comfyui", "--prefix", "model"], "end in a dot",
    ),
    "export: prefix of published": (lambda folder: ["export", changed()(folder), "--prefix", "m."], "--layout comfyui"),
    "export: float16 overflow": (
        lambda folder: ["export", with_value(1e30)(folder), "--dtype", "float16"], "beyond float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_command(tmp_path, case, capsys):
    make, words = COMMANDS[case]
    (tmp_path / "in").mkdir()
    argv = [str(part) for part in make(tmp_path / "in")] + ["--out", str(tmp_path / "out.safetensors")]
    before = listing(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(argv))
    shown = capsys.readouterr()
    check(stop.value.code, shown.err, shown.out, tmp_path, before, words)


@pytest.mark.parametrize(
    "out, words", [("out.pt", ".safetensors"), ("d.safetensors", "is a folder"), ("f/o.safetensors", "can't write")]
)
def test_bad_output(tmp_path, out, words, capsys):
    source = save(tmp_path, good())
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "f").write_text("a file, no folder")
    before = listing(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(["export", str(source), "--out", str(tmp_path / out)]))
    shown = capsys.readouterr()
    check(stop.value.code, shown.err, shown.out, tmp_path, before, words)
