"""Mutated files, seeded: each is loaded, or refused by a `UserError` of one line; nothing else ever comes out.

A failure names its seed: the mutation is a function of it alone.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer

from l2p_fast import load_lora
from l2p_fast.errors import UserError
from l2p_fast.formats.checkpoint import patch_size_of
from l2p_fast.loading import load_model, load_text_encoder
from l2p_fast.sampling.pipeline import load_pipeline

SEEDS = 40

# What a number, a name or a value of JSON may become.
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    16,
    255,
    2**31,
    2**32,
    2**62,
    2**63,
    2**64,
    10**30,
    0.5,
    1e308,
    True,
    None,
    "16",
    [],
    {},
    [[]],
]
NAMES = [
    "", "\0", "\ud800", "a" * 300, "layers.99999999.x", "layers.-1.x.weight", "layers.0.attention.qkv.weight", "..",
    "__metadata__", "x_embedder.weight", "all_x_embedder.16-1.weight", "all_x_embedder.0-0.weight", "lora_unet_a.alpha",
    "noise_refiner.7.attention.to_q.weight", "vae.x", "model.diffusion_model.layers.0.attention.to_q.weight",
    "layers.0.attention.to_q.weight_scale", "layers.0.attention.to_q.comfy_quant", "all_final_layer.2-1.weight",
    "local_decoder.bottleneck.0.weight", "layers.1.attention.norm_q.weight", "/etc/passwd", "é" * 200,
]  # fmt: skip
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "",
    "f32",
    None,
    5,
    ["F32"],
]
NOTES = [
    {}, [], None, 5, "int8_tensorwise", {"format": "int8_tensorwise"}, {"format": "float8_e4m3fn"}, {"format": "nvfp4"},
    {"convrot": True}, {"convrot": True, "convrot_groupsize": 16}, {"convrot": True, "convrot_groupsize": "x"},
    {"format": ["int8_tensorwise"]}, {"per_row": True, "scale_dtype": "float32"}, {"group_size": 64},
]  # fmt: skip


# --- Mutations: random numbers and a file's bytes -> other bytes -----------------------------------------------------
def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def flip(rng: random.Random, data: bytes, first: int, last: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(first, last)] = rng.randrange(256)
    return bytes(changed)


def flip_header(rng: random.Random, data: bytes) -> bytes:
    return flip(rng, data, 8, 8 + int.from_bytes(data[:8], "little"))


def flip_length(rng: random.Random, data: bytes) -> bytes:
    return flip(rng, data, 0, 9)


def flip_body(rng: random.Random, data: bytes) -> bytes:
    return flip(rng, data, 8 + int.from_bytes(data[:8], "little"), len(data))


def cut(rng: random.Random, data: bytes) -> bytes:
    header = 8 + int.from_bytes(data[:8], "little")
    return data[: rng.choice([rng.randrange(8), rng.randrange(header), rng.randrange(len(data)), len(data) - 1])]


def grow(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0", b"{}", rng.randbytes(100), data])


def edit_entry(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    what = rng.choice(["dtype", "shape", "one of the shape", "offsets", "one offset", "gone", "more"])
    if what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "shape":
        entry["shape"] = rng.choice([[], [2**31] * 3, [2**62, 2**62], [0, 2**62], [1] * 50, "shape", None, [-1], {}])
    elif what == "one of the shape":
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
    elif what == "offsets":
        entry["data_offsets"] = rng.choice([[], [0], [0, 0], [5, 2], [0, 2**63], [-4, 4], None, "0,4", [[0], [4]]])
    elif what == "one offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif what == "gone":
        entry.pop(rng.choice(list(entry)))
    else:
        entry["scale"] = rng.choice(NUMBERS)
    return whole(header, body)


def same_bytes_other_shape(rng: random.Random, data: bytes) -> bytes:
    """The container stays valid: only what the tensor is said to be changes."""
    header, body = parts(data)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    width = rng.choice([1, 2, 4, 8])
    entry["dtype"] = rng.choice({1: ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"], 2: ["F16", "I16", "BF16"],
                                 4: ["F32", "I32"], 8: ["F64", "I64"]}[width])  # fmt: skip
    entry["shape"] = rng.choice([[size // width], [1, size // width], [size // width, 1], [1, 1, size // width, 1]])
    return whole(header, body)


def rename(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    names = [name for name in header if name != "__metadata__"]
    old = rng.choice(names)
    new = rng.choice(
        [rng.choice(NAMES), rng.choice(names), old.replace("0", "7"), "diffusion_model." + old, old + ".x"]
    )
    return whole({(new if name == old else name): entry for name, entry in header.items()}, body)


def drop(rng: random.Random, data: bytes) -> bytes:
    """A tensor leaves, and the container stays valid."""
    header, body = parts(data)
    gone = set(rng.sample([name for name in header if name != "__metadata__"], rng.choice([1, 2, 10])))
    made, kept = {}, b""
    for name, entry in header.items():
        if name not in gone and name != "__metadata__":
            first, last = entry["data_offsets"]
            made[name] = entry | {"data_offsets": [len(kept), len(kept) + last - first]}
            kept += body[first:last]
    return whole(made, kept)


def add(rng: random.Random, data: bytes) -> bytes:
    """Another tensor comes, and the container stays valid: a scale, a note, a layer, anything."""
    header, body = parts(data)
    quantized = rng.choice([name for name in header if name.endswith(".weight")])
    stem = rng.choice([quantized.removesuffix("weight"), "layers.0.attention.", ""])
    leaf = rng.choice(["weight_scale", "comfy_quant", "scale_weight", "input_scale", "bias", "alpha", "hada_w1_a"])
    name = rng.choice([stem + leaf, stem + leaf, rng.choice(NAMES)])
    added = rng.choice([json.dumps(rng.choice(NOTES)).encode(), rng.randbytes(4), rng.randbytes(64), b"[" * 5000])
    width = 4 if len(added) % 4 == 0 and rng.random() < 0.5 else 1
    header[name] = {"dtype": {4: "F32", 1: "U8"}[width], "shape": [len(added) // width],
                    "data_offsets": [len(body), len(body) + len(added)]}  # fmt: skip
    if leaf != "bias" and rng.random() < 0.5:  # say that the weight is quantized, as far as its bytes allow
        entry = header[quantized]
        first, last = entry["data_offsets"]
        entry |= {"dtype": rng.choice(["I8", "F8_E4M3"]), "shape": [*entry["shape"][:-1], entry["shape"][-1] * 2]}
        assert last - first > 0
    return whole(header, body + added)


def metadata(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    name = rng.choice(["rope_grid", "axes_dims", "axes_lens", "t_scale", "norm_eps", "rope_theta", "dim", "n_layers"])
    config = {name: rng.choice([*NUMBERS, [1, 2], [2, 2, 2], [2**40] * 3, [4, 6, 6]])}
    key = rng.choice(["l2p_config", "l2p_config", "_quantization_metadata", "lora_adapter_metadata", "format"])
    value = rng.choice([json.dumps(config), json.dumps({"layers": config}), "{", "[]", "[" * 9000, 5, None, [], "NaN"])
    header["__metadata__"] = rng.choice([{key: value}, {key: value}, {key: value}, value])
    return whole(header, body)


KINDS: list[Callable[[random.Random, bytes], bytes]] = [
    flip_header, flip_length, flip_body, cut, grow, edit_entry, same_bytes_other_shape, rename, drop, add, metadata,
]  # fmt: skip


def any_kind(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice([1, 2])):
        try:
            data = rng.choice(KINDS)(rng, data)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            break  # the first change left nothing for the second
    return data


# --- Files that are mutated ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    model = tiny_transformer()
    save_file({key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "pipeline"
    tiny_pipeline().save_pretrained(path)
    return path


def outcome(load: Callable[[], Any], seed: int) -> bool:
    """Whether ``load`` went well; fails the test for all but success and a `UserError` of one printable line."""
    try:
        load()
    except UserError as error:
        said = " ".join(str(error).split())
        assert said.isprintable() and 10 < len(said) < 1500, f"seed {seed}: {said!r}"
        said.encode()
        return False
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return True


def check_model(path: Path, **options: Any) -> None:
    model = load_model(path, torch.float32, **options)
    values = [*model.parameters(), *model.buffers()]
    assert not any(value.is_meta for value in values)
    assert all(value.float().isfinite().all() for value in values)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_mutated_checkpoints(tmp_path, checkpoint, kind):
    went_well = 0
    for seed in range(SEEDS):
        rng = random.Random(f"{kind.__name__} {seed}")
        path = tmp_path / "m.safetensors"
        path.write_bytes(kind(rng, checkpoint))
        patch_size_of(path)  # never raises
        went_well += outcome(lambda path=path, seed=seed: check_model(path, quantize=[None, "int8"][seed % 2]), seed)
    assert went_well < SEEDS, "no mutation did any harm"


def test_mutated_loras(tmp_path):
    names = [f"transformer.layers.0.attention.{name}" for name in ("to_q", "to_k", "to_v")]
    pairs = {
        f"{name}.lora_{x}.weight": torch.ones(shape) for name in names for x, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(pairs, tmp_path / "good.safetensors", {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'})
    good, model = (tmp_path / "good.safetensors").read_bytes(), tiny_transformer()
    for seed in range(2 * SEEDS):
        path = tmp_path / "m.safetensors"
        path.write_bytes(any_kind(random.Random(f"lora {seed}"), good))
        outcome(lambda path=path: load_lora(model, path, 1e-3), seed)
        assert all(value.isfinite().all() for value in model.parameters())


def mutate_text(rng: random.Random, text: bytes) -> bytes:
    """A JSON file's bytes cut, flipped, or one of its values changed."""
    what = rng.choice(["cut", "flip", "value", "value", "value", "deep"])
    if what == "cut":
        return text[: rng.randrange(len(text))]
    if what == "flip":
        return flip(rng, text, 0, len(text))
    if what == "deep":
        return text.rstrip()[:-1] + b', "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    found = json.loads(text)
    place = found
    while isinstance(inner := place[rng.choice(list(place))] if isinstance(place, dict) and place else None, dict):
        if rng.random() < 0.3 or not inner:
            break
        place = inner
    place[rng.choice(list(place))] = rng.choice([*NUMBERS, "../../etc/passwd", ["os", "system"], "a" * 10_000])
    return json.dumps(found).encode()


def test_mutated_text_encoders(tmp_path):
    good = tmp_path / "good"
    tiny_text_encoder().save_pretrained(good / "text_encoder")
    tiny_tokenizer().save_pretrained(good / "tokenizer")
    files = sorted(file.relative_to(good) for file in good.rglob("*") if file.is_file())
    shutil.copytree(good, tmp_path / "m")
    for seed in range(2 * SEEDS):
        rng = random.Random(f"text encoder {seed}")
        name = rng.choice(files)
        data = (good / name).read_bytes()
        if name.suffix == ".safetensors":
            data = any_kind(rng, data)
        else:
            data = mutate_text(rng, data) if name.suffix == ".json" else flip(rng, data, 0, len(data))
        (tmp_path / "m" / name).write_bytes(data)
        outcome(lambda: load_text_encoder(tmp_path / "m"), seed)
        (tmp_path / "m" / name).write_bytes((good / name).read_bytes())


def test_mutated_pipeline_folders(tmp_path, folder):
    files = ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json")
    shutil.copytree(folder, tmp_path / "m")
    for seed in range(SEEDS):
        rng = random.Random(f"pipeline {seed}")
        name = rng.choice(files)
        (tmp_path / "m" / name).write_bytes(mutate_text(rng, (folder / name).read_bytes()))
        outcome(lambda: load_pipeline(tmp_path / "m"), seed)
        (tmp_path / "m" / name).write_bytes((folder / name).read_bytes())
