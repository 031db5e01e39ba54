"""What a user of diffusers expects: the generic class, components, callbacks, schedulers, images, LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline, tiny_transformer

from l2p_fast import L2PPipeline
from l2p_fast.errors import UserError
from l2p_fast.sampling import flow
from l2p_fast.sampling.pipeline import make_scheduler

SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.5}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> L2PPipeline:
    return tiny_pipeline()


def test_the_generic_class_and_variants(tmp_path):
    tiny_pipeline(default_steps=2).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    program = f"""
import l2p_fast, sys
assert not {{"torch", "diffusers"}} & set(sys.modules)
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, variant="fp16", torch_dtype=torch.float16)
assert type(pipe) is l2p_fast.L2PPipeline and pipe.default_steps == 2 and pipe.transformer.dtype == torch.float16
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    # ... and when diffusers was imported first
    program = program.replace("import l2p_fast, sys\nassert not", "import sys\nfrom diffusers import DiffusionPipeline")
    program = program.replace(""" {"torch", "diffusers"} & set(sys.modules)""", "\nimport l2p_fast")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_components_and_from_pipe_keep_all():
    pipe = tiny_pipeline(default_steps=2, default_guidance_scale=1.5, coarse_size=3, coarse_strength=0.7)
    for other in (L2PPipeline(**pipe.components), L2PPipeline.from_pipe(pipe)):
        assert other.transformer is pipe.transformer and other.text_encoder is pipe.text_encoder
        assert (other.default_steps, other.default_guidance_scale) == (2, 1.5)
        assert (other.config.coarse_size, other.config.coarse_strength) == (3, 0.7)


def test_latents_are_noise_and_sizes_may_be_numpys(pipe):
    noise = torch.randn(1, 3, 32, 48, generator=seeded(1))
    sizes = {"height": np.int64(32), "width": np.int32(48), "num_inference_steps": np.int64(3)}
    kwargs = SMALL | sizes | {"output_type": "pt"}
    wanted = pipe("a", noise=noise, **kwargs).images
    assert torch.equal(pipe("a", latents=noise, **kwargs).images, wanted)
    with pytest.raises(UserError, match="two names"):
        pipe("a", noise=noise, latents=noise, **kwargs)
    with pytest.raises(UserError, match="height must be a whole number"):
        pipe("a", **kwargs | {"height": 32.5})


def test_sigmas(pipe):
    kwargs = SMALL | {"output_type": "pt"}
    wanted = pipe("a", generator=seeded(), **kwargs).images
    kwargs["num_inference_steps"] = None
    assert torch.equal(pipe("a", generator=seeded(), sigmas=[1.0, 2 / 3, 1 / 3], **kwargs).images, wanted)
    for wrong in ([0.5, 0.7], [1.0, 0.0], [], [1.2, 0.3]):
        with pytest.raises(UserError, match="sigmas must fall"):
            pipe("a", sigmas=wrong, **kwargs)
    with pytest.raises(UserError, match="leave one out"):
        pipe("a", sigmas=[1.0, 0.5], **SMALL)


def test_max_sequence_length(pipe):
    text = "x" * 300
    kwargs = SMALL | {"output_type": "pt"}
    short = pipe.encode_prompt([text], max_sequence_length=40)
    assert short[0].shape[0] == 40
    embeds = {"prompt_embeds": short, "negative_prompt_embeds": pipe.encode_prompt([""])}
    got = pipe(text, generator=seeded(), max_sequence_length=40, **kwargs).images
    torch.testing.assert_close(got, pipe(generator=seeded(), **embeds, **kwargs).images, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="max_sequence_length must be from 1 to 512"):
        pipe(text, max_sequence_length=1000, **kwargs)


def test_diffusers_own_callback_ends_guidance(pipe, monkeypatch):
    rows, seen = [], []
    real = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *a, **k: rows.append(len(x)) or real(x, *a, **k))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)

    def watch(p, step, t, tensors):
        seen.append((p.guidance_scale, p.num_timesteps, p.do_classifier_free_guidance))
        return cutoff(p, step, t, tensors)

    pipe("a", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=cutoff.tensor_inputs, **SMALL)
    assert rows == [2, 2, 1] and seen == [(2.5, 3, True), (2.5, 3, True), (0.0, 3, False)]
    pipe(["a", "b"], callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=cutoff.tensor_inputs, **SMALL)
    assert rows[3:] == [4, 4, 2]


def test_a_callback_may_change_the_prompt(pipe):
    other = pipe.encode_prompt(["a blue ring"])

    def change(p, step, t, tensors):
        assert torch.equal(tensors["prompt_embeds"][0], other[0]) is (step > 0)
        return {"prompt_embeds": other} if step == 0 else {}

    kwargs = SMALL | {"output_type": "pt", "guidance_scale": 1.0}
    inputs = {"callback_on_step_end_tensor_inputs": ("prompt_embeds",)}
    plain = pipe("a", generator=seeded(), **kwargs).images
    changed = pipe("a", generator=seeded(), callback_on_step_end=change, **inputs, **kwargs).images
    assert not torch.equal(plain, changed)


# --- schedulers ---


def reference_heun(pipe, x: torch.Tensor, cap: torch.Tensor, scheduler) -> torch.Tensor:
    """Heun's method by the book on the scheduler's own levels."""
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])

    def v(x, sigma):
        return flow.velocity(pipe.transformer(x, (1 - sigma).expand(1), [cap]))

    for sigma, after in zip(levels[:-1], levels[1:], strict=True):
        first = v(x, sigma)
        slope = first if after == 0 else (first + v(x + first * (after - sigma), after)) / 2
        x = x + slope * (after - sigma)
    return x


def test_heun(pipe):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    other = L2PPipeline(pipe.transformer, pipe.text_encoder, pipe.tokenizer, scheduler)
    other.set_progress_bar_config(disable=True)
    noise, steps = torch.randn(1, 3, 32, 48, generator=seeded(1)), []
    kwargs = SMALL | {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    watch = {"callback_on_step_end": lambda p, i, t, k: steps.append(i) or {}}
    out = other("a star", noise=noise, **watch, **kwargs).images
    scheduler.set_timesteps(4)
    with torch.no_grad():
        wanted = reference_heun(pipe, noise, pipe.encode_prompt(["a star"])[0], scheduler)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert steps == list(range(7)) == list(range(other.num_timesteps))
    image = PIL.Image.new("RGB", (48, 32), "red")
    steps.clear()
    other("a star", image=image, strength=0.5, **watch, **kwargs)
    assert len(steps) == 7 - 2 * 2  # two of four steps, each of two predictions but the last
    with pytest.raises(UserError, match="shift: FlowMatchHeun.* leave it out"):
        other("a star", shift=2.0, **kwargs)
    with pytest.raises(UserError, match="sigmas: FlowMatchHeun"):
        other("a star", sigmas=[1.0, 0.5], **kwargs | {"num_inference_steps": None})


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_multistep_schedulers_come_nearer_to_the_flow_with_more_steps(pipe, kind):
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    noise = torch.randn(1, 3, 32, 48, generator=seeded(1))
    kwargs = SMALL | {"guidance_scale": 1.0, "output_type": "latent"}
    exact = pipe("a star", noise=noise, **kwargs | {"num_inference_steps": 200}).images
    other = L2PPipeline(pipe.transformer, pipe.text_encoder, pipe.tokenizer, kind(**flows))
    other.set_progress_bar_config(disable=True)
    errors = [
        ((other("a star", noise=noise, **kwargs | {"num_inference_steps": n}).images - exact).norm() / exact.norm())
        for n in (8, 32)
    ]
    assert errors[1] < errors[0] < 0.2 and errors[1] < 0.03
    wrong = L2PPipeline(pipe.transformer, pipe.text_encoder, pipe.tokenizer, kind())
    with pytest.raises(UserError, match="wanted a flow-matching one"):
        wrong("a star", **kwargs)


def test_threads_share_a_pipeline(pipe):
    wanted = {n: pipe("a", generator=seeded(), **SMALL | {"num_inference_steps": n}).images[0] for n in (2, 7)}
    found, failed = {2: [], 7: []}, []

    def run(n: int) -> None:
        try:
            for _ in range(3):
                found[n].append(pipe("a", generator=seeded(), **SMALL | {"num_inference_steps": n}).images[0])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in (2, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for n, images in found.items():
        assert len(images) == 3 and all(np.array_equal(np.array(image), np.array(wanted[n])) for image in images)


# --- images ---


def test_images_of_every_form_are_the_same_image(pipe):
    bytes_ = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    tensor = torch.from_numpy(bytes_).permute(2, 0, 1)
    floats = tensor.float() / 255
    kwargs = SMALL | {"height": None, "width": None, "output_type": "pt", "strength": 0.4}
    wanted = pipe("a", image=PIL.Image.fromarray(bytes_), generator=seeded(), **kwargs).images
    for image in (bytes_, bytes_ / 255.0, tensor, floats, floats * 2 - 1, floats[None], bytes_[None], [tensor]):
        got = pipe("a", image=image, generator=seeded(), **kwargs).images
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    for wrong, words in (
        (floats * 255, "from 0 to 2"),
        (tensor.int(), "wanted bytes or floats"),
        (floats[:2], "3, H, W"),
    ):
        with pytest.raises(UserError, match=words):
            pipe("a", image=wrong, **kwargs)


def test_two_images_of_two_prompts_twice(pipe):
    images = [PIL.Image.new("RGB", (48, 32), color) for color in ("red", "blue")]
    kwargs = SMALL | {"output_type": "pt", "strength": 0.4}
    four = pipe(["a", "b"], image=images, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], **kwargs)
    for i in range(4):
        alone = pipe(["a", "b"][i // 2], image=images[i // 2], generator=seeded(i), **kwargs).images[0]
        torch.testing.assert_close(four.images[i], alone, rtol=0, atol=1e-5)
    arrays = np.stack([np.array(image) for image in images])
    again = pipe(["a", "b"], image=arrays, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], **kwargs)
    torch.testing.assert_close(again.images, four.images, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="wanted 1, 2 or 4, got 3"):
        pipe(["a", "b"], image=[*images, images[0]], num_images_per_prompt=2, **kwargs)


# --- what is not finite ---


def test_an_image_that_is_not_finite_names_the_step(pipe):
    with pytest.raises(UserError, match="not finite after step 1 of 3 .*guidance"):
        pipe(prompt_embeds=[torch.full((3, 32), float("nan"))], negative_prompt="", **SMALL)
    with pytest.raises(UserError, match="guidance_scale must be at most"):
        pipe("a", **SMALL | {"guidance_scale": 1e308})
    half = L2PPipeline(tiny_transformer().half(), None, None, make_scheduler())
    half.set_progress_bar_config(disable=True)
    half.transformer.layers[1].feed_forward.w2.weight.data.fill_(6e4)
    with pytest.raises(UserError, match="weights in float16.*use bfloat16 or float32"):
        half(prompt_embeds=[torch.ones(3, 32)], **SMALL | {"guidance_scale": 1.0})


# --- LoRA ---


def test_lora_family(pipe, tmp_path):
    pipe = L2PPipeline(tiny_transformer(), pipe.text_encoder, pipe.tokenizer, make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    weights = {}
    for part in ("to_q", "to_v"):
        weights[f"diffusion_model.layers.0.attention.{part}.lora_A.weight"] = torch.randn(4, 32, generator=seeded(1))
        weights[f"diffusion_model.layers.0.attention.{part}.lora_B.weight"] = torch.randn(32, 4, generator=seeded(2))
    save_file(weights, tmp_path / "lora.safetensors")

    def draw(**kwargs):
        return pipe("a", generator=seeded(), output_type="pt", **SMALL, **kwargs).images

    strong = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16, "transformer.r": 4})}
    save_file(weights, tmp_path / "strong.safetensors", metadata=strong)
    plain = draw()
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="one")
    adapted = draw()
    assert not torch.equal(adapted, plain)
    torch.testing.assert_close(draw(attention_kwargs={"scale": 0.0}), plain)
    torch.testing.assert_close(draw(), adapted)  # the scale did not outlive its run
    pipe.set_adapters(["one"], [0.0])
    torch.testing.assert_close(draw(), plain)
    pipe.set_adapters(["one"], [1.0])
    pipe.fuse_lora()
    torch.testing.assert_close(draw(), adapted, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(), plain, rtol=0, atol=1e-4)
    pipe.load_lora_weights(tmp_path, weight_name="strong.safetensors")
    torch.testing.assert_close(draw(attention_kwargs={"scale": 0.25}), adapted, rtol=0, atol=1e-4)  # alpha / rank = 4
    pipe.delete_adapters("default_0")
    pipe.load_lora_weights(weights, adapter_name="two")  # a state dict goes through diffusers
    torch.testing.assert_close(draw(), adapted, rtol=0, atol=1e-4)
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="three")  # ours over diffusers' own
    assert pipe.get_list_adapters() == {"transformer": ["two", "three"]}
    pipe.set_adapters(["two", "three"], [0.25, 0.75])
    assert pipe.get_active_adapters() == ["two", "three"]
    torch.testing.assert_close(draw(), adapted, rtol=0, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(), plain, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="only scale"):
        draw(attention_kwargs={"ip_adapter_masks": []})
