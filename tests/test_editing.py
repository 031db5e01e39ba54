"""Editing: what is kept comes back bit for bit, what is drawn joins it, and each pixel starts at its own step."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image, ImageCms
from tiny_pipeline import save_tiny, tiny_pipeline

from l2p_fast import sample
from l2p_fast.errors import FieldError, UserError
from l2p_fast.sampling import editing, flow, session
from l2p_fast.sampling.drawing import as_mask, read_mask
from l2p_fast.sampling.editing import feathered
from l2p_fast.sampling.pipeline import L2PPipeline
from l2p_fast.sampling.pixels import image_to_pixels
from l2p_fast.sampling.request import Request, drawn_size, margins_of
from l2p_fast.sampling.session import Session, Setup

STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> L2PPipeline:
    return tiny_pipeline()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def box(width: int, height: int, *corners: int, value: int = 255) -> Image.Image:
    """A mask whose pixels from (left, top) up to (right, bottom) are drawn."""
    mask = Image.new("L", (width, height))
    mask.paste(value, corners)
    return mask


# --- what is kept, and what is drawn ---


@pytest.mark.parametrize("size", [(48, 32), (45, 30)])  # (multiples of the patch, and not)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_what_is_black_comes_back_and_the_rest_is_drawn(pipe, size, strength):
    image, mask = picture(*size), box(*size, 20, 8, 40, 30)
    out = pipe("a", image=image, mask_image=mask, strength=strength, generator=seeded(), **STEPS).images[0]
    assert out.size == size
    same, drawn = (np.array(out) == np.array(image)).all(-1), np.array(mask) > 0
    assert same[~drawn].all() and same[drawn].mean() < 0.05


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
)
def test_with_schedulers_of_higher_order(pipe, scheduler):
    image, mask = picture(48, 32), box(48, 32, 16, 0, 48, 32)
    other = L2PPipeline(pipe.transformer, pipe.text_encoder, pipe.tokenizer, scheduler)
    other.set_progress_bar_config(disable=True)
    out = np.array(other("a", image=image, mask_image=mask, generator=seeded(), **STEPS).images[0])
    assert np.array_equal(out[:, :16], np.array(image)[:, :16]) and (out != np.array(image))[:, 16:].mean() > 0.9


def test_a_white_mask_is_no_mask(pipe):
    size = {"height": 32, "width": 48, "output_type": "latent"} | STEPS
    image, mask = picture(48, 32), box(48, 32, 0, 0, 48, 32)
    out = pipe("a", image=image, mask_image=mask, generator=seeded(), **size).images
    assert torch.equal(out, pipe("a", generator=seeded(), **size).images)
    out = pipe("a", image=image, mask_image=mask, strength=0.5, generator=seeded(), **size).images
    assert torch.equal(out, pipe("a", image=image, strength=0.5, generator=seeded(), **size).images)


def test_what_is_kept_follows_the_schedule_with_the_same_noise(pipe):
    """As RePaint and diffusers put it in: the image at each step's noise level, with the noise of the first."""
    image, mask = picture(48, 32), box(48, 32, 0, 0, 16, 32)
    x0, noise, states = image_to_pixels(image, 32, 48), torch.randn(1, 3, 32, 48, generator=seeded(3)), []

    def watch(p, step, t, tensors):
        states.append(tensors["latents"])

    how = {"image": image, "mask_image": mask, "noise": noise, "callback_on_step_end": watch}
    pipe("a", strength=0.75, **how, **STEPS)
    sigmas = flow.sigmas(4)[1:]
    assert len(states) == 3
    for state, sigma in zip(states, sigmas[1:], strict=True):
        wanted = flow.add_noise(x0, noise, float(sigma))
        torch.testing.assert_close(state[..., 16:], wanted[..., 16:], rtol=0, atol=2e-6)
        assert (state - wanted)[..., :16].abs().max() > 0.01


def test_gray_is_the_share_of_the_steps(pipe):
    """A pixel of 0.5 is the image's own for the first half of the steps, and is drawn from there on."""
    image, mask, states = picture(48, 32), box(48, 32, 0, 0, 48, 32, value=128), []
    x0, noise = image_to_pixels(image, 32, 48), torch.randn(1, 3, 32, 48, generator=seeded(3))

    def watch(p, step, t, tensors):
        states.append(tensors["latents"])

    how = {"image": image, "noise": noise, "output_type": "latent", "callback_on_step_end": watch}
    out = pipe("a", mask_image=mask, **how, **STEPS | {"num_inference_steps": 8}).images
    kept = [
        torch.allclose(state, flow.add_noise(x0, noise, float(sigma)), rtol=0, atol=2e-6)
        for state, sigma in zip(states, flow.sigmas(8)[1:], strict=True)
    ]
    first = 3  # 128 / 255 is a little more than a half, and its step is begun
    assert kept == [True] * first + [False] * (8 - first)
    states.clear()
    alone = pipe("a", strength=(8 - first) / 8, **how, **STEPS | {"num_inference_steps": 8}).images
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)  # image to image of that strength


def test_the_seam_lies_within_what_is_drawn():
    mask = torch.zeros(1, 1, 12, 14, dtype=torch.uint8)
    mask[..., 2:, 4:] = 200
    soft = feathered(mask, 3)
    assert (soft[mask == 0] == 0).all() and soft[0, 0, 8].tolist() == [0] * 4 + [50, 100, 150] + [200] * 7
    assert soft[0, 0, 2:, 10].tolist() == [50, 100, 150] + [200] * 7  # the image's own edges are no seam
    assert torch.equal(feathered(mask, 0), mask) and (feathered(mask, 4096)[mask > 0] > 0).all()
    values = torch.randint(1, 255, mask.shape, generator=seeded(), dtype=torch.uint8)
    assert torch.equal(feathered(values, 5), values)  # nothing is kept: there is no seam


def test_the_seam_is_softer_with_a_blend(pipe):
    """Near the seam the image stays longer, so what is drawn differs less from it."""
    image, mask = Image.new("RGB", (64, 32), "gray"), box(64, 32, 32, 0, 64, 32)
    off = []
    for blend in (0, 16):
        out = pipe("a", image=image, mask_image=mask, mask_blend=blend, generator=seeded(), **STEPS).images[0]
        off.append(np.abs(np.array(out, float) - np.array(image, float)).mean((0, 2)))
    assert off[1][32:36].mean() < 0.7 * off[0][32:36].mean() and off[1][50:].mean() > 0.5 * off[0][50:].mean()


def test_bands_are_the_whole(pipe, monkeypatch):
    image, mask = picture(48, 40), box(48, 40, 5, 3, 40, 33, value=180)
    how = {"image": image, "mask_image": mask, "output_type": "latent", "outpaint": (0, 0, 16, 8)} | STEPS
    whole = pipe(["a", "b"], generator=[seeded(1), seeded(2)], **how).images
    monkeypatch.setattr(editing, "_BAND_PIXELS", 7 * 64)
    assert torch.equal(pipe(["a", "b"], generator=[seeded(1), seeded(2)], **how).images, whole)


def test_outpaint(pipe):
    image = picture(40, 24)
    out = pipe("a", image=image, outpaint=(8, 16, 5, 0), generator=seeded(), **STEPS).images[0]
    assert out.size == (53, 40)
    assert np.array_equal(np.array(out)[16:, 8:48], np.array(image))
    mask = box(40, 24, 0, 0, 10, 10)
    both = pipe("a", image=image, mask_image=mask, outpaint=(8, 16, 5, 0), generator=seeded(), **STEPS).images[0]
    same = (np.array(both)[16:, 8:48] == np.array(image)).all(-1)
    assert same[np.array(mask) == 0].all() and same[np.array(mask) > 0].mean() < 0.1


def test_an_edit_has_a_coarse_start_too():
    pipe, seen = tiny_pipeline(coarse_size=2, coarse_strength=0.8), []

    def watch(p, step, t, tensors):
        seen.append((p.stage, tensors["latents"].shape[-1]))

    image, mask = picture(90, 60), box(90, 60, 40, 0, 90, 60)
    out = pipe("a", image=image, mask_image=mask, generator=seeded(), callback_on_step_end=watch, **STEPS).images[0]
    assert [stage for stage, _ in seen] == ["coarse"] * 4 + ["full"] * 2 and {w for _, w in seen} == {32, 96}
    assert np.array_equal(np.array(out)[:, :40], np.array(image)[:, :40])
    seen.clear()
    pipe("a", image=image, mask_image=mask, strength=0.5, callback_on_step_end=watch, **STEPS)
    assert [stage for stage, _ in seen] == ["full"] * 2  # the image itself is the start


def test_what_is_kept_comes_back_whatever_a_callback_does(pipe):
    image, mask = picture(48, 32), box(48, 32, 16, 0, 48, 32)

    def change(p, step, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    def stop(p, step, t, tensors):
        p._interrupt = step == 1

    for callback in (change, stop):
        out = pipe("a", image=image, mask_image=mask, callback_on_step_end=callback, **STEPS).images[0]
        assert np.array_equal(np.array(out)[:, :16], np.array(image)[:, :16])


def test_many_images_and_masks_of_any_form(pipe):
    images = [picture(48, 32, seed) for seed in (1, 2)]
    mask = box(48, 32, 24, 0, 48, 32)
    values = torch.tensor(np.array(mask))[None].float() / 255

    def draw(image, mask) -> np.ndarray:
        how = {"generator": [seeded(1), seeded(2)], "output_type": "np"} | STEPS
        return pipe(["a", "b"], image=image, mask_image=mask, **how).images

    wanted = draw(images, mask)
    for form in (values, values.bool().numpy()[0], [values, mask], np.array(mask)[..., None]):
        assert np.array_equal(draw(images, form), wanted)
    pixels = [torch.tensor(np.array(image)).permute(2, 0, 1) for image in images]
    np.testing.assert_allclose(draw([images[0], pixels[1].float() / 255], mask), wanted, atol=1e-5)
    how = {"generator": seeded(2), "output_type": "np"} | STEPS
    alone = pipe("b", image=images[1], mask_image=mask, **how).images[0]
    np.testing.assert_allclose(alone, wanted[1], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": None}, "no effect without image"),
        ({"mask_image": box(40, 32, 0, 0, 9, 9)}, "mask_image has 40x32 pixels and image 48x32; give one of 48x32"),
        ({"mask_image": Image.new("L", (48, 32))}, "black all over"),
        ({"mask_image": torch.full((1, 32, 48), 2.0)}, "floats in \\[0, 1\\], got values from 2"),
        ({"mask_image": torch.zeros(1, 32, 48, dtype=torch.int64)}, "bytes, booleans or floats"),
        ({"mask_image": torch.zeros(3, 32, 48)}, "one channel"),
        ({"mask_image": []}, "mask_image: wanted at least one, got none"),
        ({"mask_image": [box(48, 32, 0, 0, 9, 9)] * 3}, "mask_image: wanted 1"),
        ({"mask_blend": -1}, "mask_blend must be at least 0"),
        ({"outpaint": (0, 0, 0, 0)}, "outpaint adds nothing"),
        ({"outpaint": (1, 2)}, "must be LEFT,TOP,RIGHT,BOTTOM"),
        ({"outpaint": (1.5, 0, 0, 0)}, "whole pixels"),
        ({"outpaint": (-8, 0, 0, 0)}, "whole pixels"),
        ({"height": 64}, "height is 64, but .* stays as large as it is, 32; leave it out"),
        ({"image": [picture(48, 32), picture(32, 48)], "prompt": ["a", "b"]}, "images of one size"),
    ],
)
def test_wrong_arguments(pipe, change, words):
    how = {"prompt": "a", "image": picture(48, 32), "mask_image": box(48, 32, 0, 0, 9, 9)} | STEPS
    with pytest.raises(UserError, match=words):
        pipe(**how | change)


def test_a_mask_narrower_than_its_blend_is_said(pipe, caplog):
    pipe("a", image=picture(48, 32), mask_image=box(48, 32, 10, 0, 14, 32), mask_blend=8, **STEPS)
    assert "nothing to be drawn is wider than 16 pixels" in caplog.text


# --- requests and files ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": "m.png", "image": None}, "mask has no effect without image"),
        ({"outpaint": "0,0,8,0", "image": None}, "outpaint has no effect without image"),
        ({"mask_blend": 8}, "mask_blend has no effect without mask or outpaint"),
        ({"refine": 0.3, "strength": 0.3}, "refine draws all of an image anew; leave it out, or strength"),
        ({"refine": 0.3, "mask": "m.png"}, "refine draws all .* or mask"),
        ({"refine": 0.0}, "refine must be above 0"),
        ({"mask": "m.png", "mask_blend": 1 << 20}, "mask_blend must be at most 4096"),
        ({"outpaint": "8"}, "outpaint must be LEFT,TOP,RIGHT,BOTTOM in whole pixels, got '8'; try 0,0,256,0"),
        ({"outpaint": "1,2,3,4,5"}, "LEFT,TOP"),
        ({"outpaint": "-8,0,0,0"}, "LEFT,TOP"),
        ({"outpaint": "1e9,0,0,0"}, "LEFT,TOP"),
        ({"outpaint": "٣,0,0,0"}, "LEFT,TOP"),
        ({"outpaint": "9999999,0,0,0"}, "at most 1048576 pixels a side"),
        ({"outpaint": "0, 0,0,0"}, "adds nothing"),
    ],
)
def test_what_a_request_can_not_be(change, words):
    with pytest.raises(FieldError, match=words):
        Request.from_dict({"prompt": "a", "seed": 1, "image": "a.png"} | change)


def test_sizes_of_requests():
    def size(image: str | None = None, **fields):
        own = None if image is None else (750, 1000)
        return drawn_size(Request("a", 1, image=image, **fields), own, 4096, 64)

    assert size(image="a.png") == (768, 1024) and size() == (4096, 4096)
    assert size(image="a.png", refine=0.3) == (3072, 4096) and size(image="a.png", refine=0.3, width=640) == (640, 640)
    assert size(image="a.png", mask="m.png") == (750, 1000)
    assert (
        size(image="a.png", outpaint="1,20,3,0")
        == (770, 1004)
        == size(image="a.png", outpaint="1,20,3,0", height=770, width=1004)
    )
    with pytest.raises(FieldError, match="width is 1024"):
        size(image="a.png", mask="m.png", width=1024)
    assert margins_of(" 1, 2,3 ,4") == (1, 2, 3, 4) and margins_of(None) == (0, 0, 0, 0)


def test_masks_of_every_kind(tmp_path):
    wanted = np.array(box(9, 5, 2, 1, 6, 4))
    strokes = Image.new("RGBA", (9, 5), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (2, 1, 6, 4))
    sixteen = Image.fromarray(wanted.astype(np.uint16) * 257)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(wanted)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    for mask in (box(9, 5, 2, 1, 6, 4).convert("1"), strokes, sixteen, box(9, 5, 2, 1, 6, 4).convert("P")):
        assert np.array_equal(as_mask(mask), wanted)
    assert np.array_equal(read_mask("mask", str(tmp_path / "turned.png"), (9, 5)), wanted)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_hostile_masks(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    size = (30_000).to_bytes(4, "big")
    bomb = chunk(b"IHDR", size + size + b"\x08\0\0\0\0") + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    whole = picture(48, 32).convert("L")
    whole.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:600])
    for name, words in (
        ("text.png", "not a readable image"),
        ("bomb.png", "has 30000x30000 pixels and image 48x32"),  # by its header: it is not decoded
        ("cut.png", "not a readable image"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            read_mask("mask", str(tmp_path / name), (48, 32))


# --- the command ---


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", default_steps=2, default_guidance_scale=1.0)


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_the_file_holds_what_was_kept(run, suffix):
    picture(50, 30).save("in.png", icc_profile=SRGB)
    box(50, 30, 25, 0, 50, 30).save("mask.png")
    out = f"out{suffix}"
    run("a", "--image", "in.png", "--mask", "mask.png", "--outpaint", "0,0,6,0", "--seed", 1, "--out", out)
    assert np.array_equal(pixels(out)[:, :25], pixels("in.png")[:, :25]) and Image.open(out).size == (56, 30)
    assert Image.open(out).info["icc_profile"] == SRGB


def test_the_command_is_the_pipeline(run, model, tmp_path):
    picture(50, 30).save("in.png")
    box(50, 30, 25, 0, 50, 30, value=200).save("mask.png")
    how = ("--image", "in.png", "--seed", 4, "--dtype", "fp32", "--mask-blend", 3)
    run("a", *how, "--mask", "mask.png", "--outpaint", "0,2,6,0", "--out", "out.png")
    settings = json.loads(Image.open("out.png").info["l2p_fast"])
    wanted = {"outpaint": "0,2,6,0", "mask_blend": 3, "strength": 1.0, "height": 32, "width": 56, "mask": "mask.png"}
    assert settings.items() >= wanted.items() and len(settings["mask_sha256"]) == 64
    pipe = L2PPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "a", image=Image.open("in.png"), mask_image=Image.open("mask.png"), outpaint=(0, 2, 6, 0), mask_blend=3,
        generator=seeded(4),
    ).images[0]  # fmt: skip
    assert np.array_equal(pixels("out.png"), np.array(drawn))
    request = Request.from_dict(settings)
    memory = Session(pipe, Setup(dtype="float32")).draw(
        Request.from_dict(settings | {"image": "a name", "mask": "another"}),
        image=Image.open("in.png"), mask=Image.open("mask.png"),
    )  # fmt: skip
    assert np.array_equal(pixels("out.png"), np.array(memory.image)) and request.edits


def test_an_edit_repeats_from_its_settings_and_its_files(run):
    picture(48, 32).save("in.png")
    box(48, 32, 25, 0, 48, 32).save("mask.png")
    run("a", "--image", "in.png", "--mask", "mask.png", "--out", "a.png")
    with pytest.raises(UserError, match="--image 'in.png' --mask 'mask.png'; add these options, or --trust"):
        run("--from-image", "a.png", "--out", "b.png")
    run("--from-image", "a.png", "--trust", "--out", "b.png", model=None)
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    box(48, 32, 0, 0, 20, 32).save("mask.png")
    with pytest.raises(UserError, match="--mask mask.png has changed since"):
        run("--from-image", "a.png", "--trust", "--out", "b.png", model=None)
    run("--from-image", "a.png", "--trust", "--mask", "mask.png", "--out", "b.png", model=None)
    assert np.array_equal(pixels("b.png")[:, 20:], pixels("in.png")[:, 20:])


def test_options_take_the_place_of_settings(run):
    """What can't stand beside an option that is given goes, and is not complained about."""
    picture(48, 32).save("in.png")
    run("a", "--image", "in.png", "--outpaint", "0,0,16,0", "--mask-blend", 3, "--out", "a.png")
    run("--from-image", "a.png", "--image", "in.png", "--refine", 0.3, "--width", 64, "--height", 32, "--out", "b.png")
    settings = json.loads(Image.open("b.png").info["l2p_fast"])
    assert (settings["refine"], settings["outpaint"], settings["mask_blend"]) == (0.3, None, None)
    run("--from-image", "b.png", "--image", "in.png", "--outpaint", "8,0,8,0", "--out", "c.png")
    settings = json.loads(Image.open("c.png").info["l2p_fast"])
    assert (settings["refine"], settings["strength"], settings["width"]) == (None, 1.0, 64)


def test_profile_and_orientation_of_image_to_image(run):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright, stored lying
    picture(48, 32).save("lying.png", exif=exif, icc_profile=SRGB)
    for out in ("out.png", "out.jpg", "out.webp"):
        run("a", "--image", "lying.png", "--strength", 0.3, "--seed", 1, "--out", out)
        image = Image.open(out)
        assert image.size == (32, 48) and image.info["icc_profile"] == SRGB and image.getexif().get(0x0112, 1) == 1
    Image.new("CMYK", (48, 32)).save("print.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    run("a", "--image", "print.jpg", "--strength", 0.3, "--seed", 1, "--out", "out.png")
    assert "icc_profile" not in Image.open("out.png").info  # that of other numbers than these
    picture(48, 32).save("large.jpg", icc_profile=SRGB + bytes(1 << 20))
    run("a", "--image", "large.jpg", "--strength", 0.3, "--seed", 1, "--out", "out.png")
    assert "icc_profile" not in Image.open("out.png").info  # PIL would not open the file with it
    Image.fromarray(np.full((32, 48), 30_000, np.uint16)).save("deep.png")
    run("a", "--image", "deep.png", "--outpaint", "0,0,16,0", "--seed", 1, "--out", "out.png")
    assert (pixels("out.png")[:, :48] == 117).all()  # 16 bits of gray


def test_jpg_says_that_it_keeps_nothing(run, capsys):
    picture(48, 32).save("in.png")
    run("a", "--image", "in.png", "--outpaint", "16,0,0,0", "--out", "out.jpg")
    assert "note: jpg changes every pixel; png and webp keep" in capsys.readouterr().err


def test_refine(run, model, tmp_path, capsys):
    """A small image, given or drawn first, is drawn anew at the model's size or the one asked for."""
    picture(24, 16).save("small.png")
    how = ("--seed", 3, "--dtype", "fp32")
    run("a", "--image", "small.png", "--refine", 0.5, "--width", 96, "--height", 64, *how, "--out", "a.png")
    run("a", "--image", "small.png", "--strength", 0.5, "--width", 96, "--height", 64, *how, "--out", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    settings = json.loads(Image.open("a.png").info["l2p_fast"])
    assert settings["refine"] == 0.5 and settings["strength"] is None and settings["draft"] is None

    save_tiny(tmp_path / "large", 64, default_steps=2, default_guidance_scale=1.0)
    large = tmp_path / "large"
    with pytest.raises(UserError, match="--refine has no small image; add --image, or --draft with a model"):
        run("a", "--refine", 0.5, "--width", 256, "--height", 64, model=large)
    drafted = ("a", "--refine", 0.5, "--width", 256, "--height", 64, *how)
    run(*drafted, "--draft", model, "--out", "c.png", model=large)
    assert Image.open("c.png").size == (256, 64) and f"draft      {model}" in capsys.readouterr().out
    with pytest.raises(UserError, match="names --model .* --draft .*; add these options, or --trust"):
        run("--from-image", "c.png", "--out", "d.png", model=None)
    run("--from-image", "c.png", "--trust", "--out", "d.png", model=None)
    assert np.array_equal(pixels("c.png"), pixels("d.png"))
    run("a", "--width", 1024, "--height", 256, *how, "--out", "small.png")  # by hand: the draft at its own size
    run("a", "--image", "small.png", *drafted[1:], "--out", "e.png", model=large)
    assert np.array_equal(pixels("c.png"), pixels("e.png"))


def test_the_bundled_models_refine(tmp_path, monkeypatch):
    """The large one, from what the small one draws; its own size where none is asked for."""
    monkeypatch.chdir(tmp_path)
    parser = sample.build_parser()
    setup, request, _, found = sample.settle(parser.parse_args(["a", "--refine", "0.35"]))
    assert (setup.draft, found.name, request.height) == ("tiny-1k", "tiny-4k", 4096)
    picture(64, 32).save("in.png")
    setup, request, _, found = sample.settle(parser.parse_args(["a", "--refine", "0.35", "--image", "in.png"]))
    assert (setup.draft, found.name, request.width, request.height) == (None, "tiny-4k", 4096, 2048)


WRONG = [
    (["--mask", "mask.png"], "--mask has no effect without --image; add one, or leave it out"),
    (["--image", "in.png", "--mask", "small.png"], "--mask has 16x16 pixels and --image 48x32; give one of 48x32"),
    (["--image", "in.png", "--mask", "black.png"], "--mask is black all over"),
    (["--image", "in.png", "--mask", "mas.png"], "mas.png does not exist; did you mean mask.png"),
    (["--image", "in.png", "--outpaint", "a,b"], "--outpaint must be LEFT,TOP,RIGHT,BOTTOM .* try 0,0,256,0"),
    (["--image", "in.png", "--mask", "mask.png", "--res", "64"], "--res is 64, but .* as it is, 32; leave it out"),
    (["--image", "in.png", "--mask-blend", "4"], "--mask-blend has no effect without --mask or --outpaint"),
    (["--image", "in.png", "--refine", "0.3", "--strength", "0.5"], "leave it out, or --strength"),
    (["--image", "in.png", "--refine", "0.3", "--draft", "tiny-1k"], "--draft has no effect without --refine"),
    (["--draft", "tiny-1k"], "--draft has no effect without --refine, or beside --image"),
    (["--refine", "2"], "--refine must be above 0 and at most 1, got 2.0; try 1"),
    (["--refine", "0.3", "--draft", "nothing"], "--draft nothing does not exist"),
    (["--image", "in.png", "--outpaint", "0,900000,900000,0"], "this machine has"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG)
def test_wrong_options_are_answered_before_anything_is_loaded(model, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.Session, "load", lambda *a: pytest.fail("loaded"))
    picture(48, 32).save("in.png")
    box(48, 32, 0, 0, 9, 9).save("mask.png")
    box(16, 16, 0, 0, 9, 9).save("small.png")
    Image.new("L", (48, 32)).save("black.png")
    with pytest.raises(UserError, match=words) as caught:
        sample.main(["a", *argv, "--model", str(model)])
    assert "\n" not in str(caught.value)
