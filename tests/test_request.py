"""Requests and setups as data, the files that hold them, and what a stranger's file may not do."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from l2p_fast import sample
from l2p_fast.errors import FieldError, UserError
from l2p_fast.sampling import drawing, facts
from l2p_fast.sampling.drawing import Drawing, read_image, read_settings
from l2p_fast.sampling.jobs import is_finished, plan_jobs
from l2p_fast.sampling.request import RANGES, Lora, Request, Setup

REQUEST = Request("a red star", 7, height=32, width=48, steps=3, guidance=2.5)


def test_a_request_goes_to_json_and_back():
    assert Request.from_dict(json.loads(json.dumps(REQUEST.as_dict()))) == REQUEST
    setup = Setup(dtype="bf16", device="cuda:1", offload="model", head_memory_mb=64)
    assert setup.dtype == "bfloat16" and Setup.from_dict(setup.as_dict() | {"unknown": 1}) == setup
    assert Request.from_dict({"prompt": "a", "seed": 1, "guidance": 3}).guidance == 3.0


def test_loras_of_a_setup():
    setup = Setup(lora=["a.safetensors", "C:\\b:0.5", "c:d", Lora("e:1", -2)])
    assert setup.lora == (Lora("a.safetensors"), Lora("C:\\b", 0.5), Lora("c:d"), Lora("e:1", -2.0))
    assert Setup.from_dict(json.loads(json.dumps(setup.as_dict()))) == setup
    assert Setup(lora=[str(lora) for lora in setup.lora]) == setup
    assert Setup(lora="a:0.25").lora == (Lora("a", 0.25),) and Setup(lora=["none"]) == Setup()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "many"}, "steps is 'many', not int"),
        ({"steps": True}, "steps is 'True', not int"),
        ({"steps": 2.0}, "steps is '2.0', not int"),
        ({"steps": 10**9}, "steps must be at most 10000"),
        ({"seed": 2**63}, "seed must be below 2\\^63"),
        ({"guidance_interval": "0.5"}, "guidance_interval must be LOW,HIGH"),
        ({"guidance_interval": "nan,1"}, "guidance_interval must be LOW,HIGH"),
        ({"guidance_interval": "0.2,1.5"}, "got '0.2,1.5'; try 0.2,0.8"),
        ({"guidance_interval": 0.5}, "guidance_interval is '0.5', not str"),
        ({"guidance": math.nan}, "guidance must be at least 0"),
        ({"guidance": 1e308}, "guidance must be at most"),
        ({"guidance": 10**400}, "guidance must be at most"),
        ({"shift": -1.0}, "shift must be above 0"),
        ({"height": 1 << 40}, "height must be at most"),
        ({"strength": 0.5}, "strength has no effect without image"),
        ({"prompt": "\udcff"}, "prompt is not valid text"),
        ({"prompt": "x" * 200_000}, "prompt has 200000 characters"),
        ({"prompt": None}, "prompt is 'None', not str"),
        ({"negative": ["a"]}, "negative is"),
        ({"cfg_batch": "maybe"}, "cfg_batch has the unknown value"),
    ],
)
def test_what_a_request_can_not_be(change, words):
    with pytest.raises(FieldError, match=words):
        Request.from_dict(REQUEST.as_dict() | change)


def test_a_missing_field_is_named():
    with pytest.raises(FieldError, match="seed is missing"):
        Request.from_dict({"prompt": "a"})


def test_each_surface_words_fields_in_its_own_way():
    with pytest.raises(FieldError) as caught:
        Request("a", 1, strength=0.5)
    assert caught.value.worded(lambda name: f"--{name}") == "--strength has no effect without --image; " + (
        "add one, or leave it out"
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("length", [3, 20_000, 99_000])
def test_settings_of_any_length_survive(tmp_path, suffix, length):
    request = Request("雾" * length, 1)
    image = Image.fromarray(np.zeros((16, 24, 3), np.uint8))
    Drawing(image, request.as_dict(), {}).save(tmp_path / f"a{suffix}")
    assert Request.from_dict(read_settings("image", str(tmp_path / f"a{suffix}"))) == request
    assert read_image("image", str(tmp_path / f"a{suffix}")).size == (24, 16)


def test_an_image_is_not_lost_to_its_settings(tmp_path, caplog):
    image = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    Drawing(image, {"prompt": "a", "what": object()}, {}).save(tmp_path / "a.png")  # nothing that JSON knows
    assert "written without its settings" in caplog.text
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), np.array(image))


def test_thumbnail_and_pace():
    seconds = {"coarse": [2.0, 2.5, 3.0], "full": [5.0, 6.0]}
    drawing = Drawing(Image.new("RGB", (400, 200)), {}, seconds)
    assert drawing.thumbnail(100).size == (100, 50) and drawing.image.size == (400, 200)
    assert drawing.pace() == "coarse 0.5 s a step x 3, full 1 s a step x 2"
    assert Drawing(drawing.image, {}, {"full": [1.5]}).pace() == "1.5 s a step x 1"


def test_jobs_count_up_seeds_and_stay_within_bounds(tmp_path):
    jobs, format = plan_jobs(REQUEST, ["a", "b"], 2, str(tmp_path / "out"), None, "list")
    assert [job.request.seed for job in jobs] == [7, 8, 9, 10] and format == "png"
    assert [job.path.name for job in jobs] == ["0000-a-0.png", "0000-a-1.png", "0001-b-0.png", "0001-b-1.png"]
    with pytest.raises(FieldError, match="at most 100000 a run"):
        plan_jobs(REQUEST, ["a"] * 2, RANGES["num_images"].most, None, None)


def test_what_is_finished(tmp_path):
    (job,), _ = plan_jobs(REQUEST, ["a"], 1, str(tmp_path / "a.png"), None)
    assert not is_finished(job, Setup(), False)
    job.path.write_bytes(b"")
    assert not is_finished(job, Setup(), False)
    settings = job.request.as_dict() | {"shift": 3.0, "cfg_batch": "on"}
    Drawing(Image.new("RGB", (48, 32)), settings, {}).save(job.path)
    assert is_finished(job, Setup(), False)
    Drawing(Image.new("RGB", (48, 32)), settings | {"seed": 8}, {}).save(job.path)
    assert not is_finished(job, Setup(), False) and is_finished(job, Setup(), True)
    Drawing(Image.new("RGB", (48, 32)), settings | {"steps": 4}, {}).save(job.path)
    assert not is_finished(job, Setup(), True)
    Drawing(Image.new("RGB", (48, 32)), settings | {"guidance_interval": "0.2,0.8"}, {}).save(job.path)
    assert not is_finished(job, Setup(), True)
    Drawing(Image.new("RGB", (48, 32)), settings | {"lora": [{"file": "a", "scale": 0.5}]}, {}).save(job.path)
    assert not is_finished(job, Setup(), True) and is_finished(job, Setup(lora="a:0.5"), True)


# --- a stranger's image ---


def stranger(path: Path, text: str, **settings) -> str:
    info = PngInfo()
    info.add_text("l2p_fast", text or json.dumps({"prompt": "a", "seed": 1, "version": "0"} | settings))
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return str(path)


@pytest.fixture
def no_way_out(monkeypatch):
    """Nothing may be opened, looked for or fetched by what a stranger's image says."""
    for name in ("find_model", "find_draft", "check_text_encoder", "check_lora", "read_image", "read_mask"):
        monkeypatch.setattr(sample, name, lambda *a, **k: pytest.fail("touched what a stranger named"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/etc"}, "names --model '/etc'; add these options, or --trust"),
        ({"text_encoder": "evil/repo"}, "names --text-encoder 'evil/repo'"),
        ({"image": "/dev/zero", "strength": 0.5}, "names --image '/dev/zero'"),
        ({"image": "a", "mask": "/dev/zero"}, "names --image 'a' --mask '/dev/zero'"),
        ({"refine": 0.3, "draft": "evil/repo"}, "names --draft 'evil/repo'"),
        ({"image": "a", "outpaint": "1e9"}, "damaged .outpaint must be"),
        ({"image": "a", "mask": "b", "mask_blend": 10**9}, "damaged .mask_blend must be"),
        ({"draft": "a\0b"}, "damaged .draft is not a path"),
        ({"attention": "flash_hub"}, "names --attention 'flash_hub'"),
        (
            {"lora": [{"file": "/dev/zero", "scale": 0.5}, {"file": "b"}]},
            "names --lora '/dev/zero:0.5' --lora 'b'; add",
        ),
        ({"model": "a\0b"}, "damaged .model is not a path"),
        ({"lora": [{"file": "a\0b"}]}, "damaged .lora is not a path"),
        ({"lora": [{"file": "a", "scale": 1e9}]}, "damaged .lora has a scale from"),
        ({"lora": [{"file": "a", "sha256": "../b"}]}, "damaged .lora has a damaged sha256"),
        ({"lora": [7]}, "damaged .lora is '7', not FILE"),
        ({"lora": {}}, "damaged .lora is"),
        ({"lora": ["a"] * 101}, "damaged .lora is given 101 times"),
        ({"model": {}}, "damaged .model is"),
        ({"attention": ["flash"]}, "attention"),
        ({"steps": 10**12}, "settings .* damaged .steps"),
        ({"guidance": "1e9"}, "settings .* damaged .guidance"),
        ({"device": "cuda:0; rm"}, "damaged .device must be"),
        ({"prompt": {"a": 1}}, "damaged .prompt"),
    ],
)
def test_what_an_image_names_is_not_loaded_unasked(tmp_path, no_way_out, settings, words):
    path = stranger(tmp_path / "a.png", "", **settings)
    with pytest.raises(UserError, match=words) as caught:
        sample.main(["--from-image", path, "--out", str(tmp_path / "b.png")])
    assert "\n" not in str(caught.value)


def test_settings_that_are_no_settings(tmp_path):
    for text in ("[" * 100_000, "[1]", "{", "null", '{"prompt": NaN}', '{"a": 1, "a": 2}'):
        with pytest.raises(UserError, match="holds no settings"):
            read_settings("image", stranger(tmp_path / "a.png", text))


def test_image_bombs(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (200_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + b"\x08\x02\0\0\0")
    (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    with pytest.raises(UserError, match="at most 2\\^30 are read"):
        read_image("image", str(tmp_path / "big.png"))
    text = b"l2p_fast\0\0" + zlib.compress(b"x" * (1 << 26))  # 64 MB of text in 64 kB
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\0\x10\0\0\0\x10\x08\x02\0\0\0") + chunk(b"zTXt", text)
    (tmp_path / "text.png").write_bytes(whole + chunk(b"IDAT", zlib.compress(b"\0" * 784)) + chunk(b"IEND", b""))
    with pytest.raises(UserError):
        read_settings("image", str(tmp_path / "text.png"))


def test_a_size_beyond_the_memory_of_the_machine(monkeypatch):
    monkeypatch.setattr(facts.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 18}[name])
    facts.check_memory(4096, 4096, 64)
    with pytest.raises(FieldError, match="32768 asks for an image of 39 GB, .* has 1 GB; 5440 x 5440 would fit"):
        facts.check_memory(32768, 32768, 64)


def test_names_that_are_no_paths():
    for name in ("x" * 300, "a/" * 2100 + "b"):
        with pytest.raises(FieldError, match="model"):
            facts.find_model(Setup(model=name).model)
    with pytest.raises(FieldError, match="is not a path"):
        Setup(model="a\0b")
    assert drawing.LARGEST_IMAGE >= 10240**2
