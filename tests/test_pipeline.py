"""Sampling: text features, schedule, guidance, stages, memory, and the authors' own 6-step run."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import goldens
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import FEATURES, save_tiny, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_transformer

from l2p_fast.errors import UserError
from l2p_fast.models.text import encode_prompts, tokenize
from l2p_fast.sampling import flow
from l2p_fast.sampling.pipeline import L2PPipeline, load_pipeline, make_scheduler, set_schedule
from l2p_fast.sampling.pixels import draw_noise, image_to_pixels

SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 2.5}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> L2PPipeline:
    return tiny_pipeline()


# --- text ---


def test_features_are_hidden_states_before_the_last_of_the_templated_prompt():
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    (features,) = encode_prompts(encoder, tokenizer, ["a red star"])
    text = "<|im_start|>user\na red star<|im_end|>\n<|im_start|>assistant\n"  # thinking enabled: no empty <think>
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenize(tokenizer, "a red star") == ids[0].tolist()
    with torch.no_grad():
        hidden = encoder(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(features, hidden[-2][0])


def test_prompts_are_encoded_once_and_do_not_depend_on_their_neighbours():
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    rows = []
    encoder.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    prompts = ["short", "a much longer prompt than the others", "", "short"]
    together = encode_prompts(encoder, tokenizer, prompts)
    assert rows == [3]
    for prompt, features in zip(prompts, together, strict=True):
        assert features.shape == (len(tokenize(tokenizer, prompt)), FEATURES)
        torch.testing.assert_close(features, encode_prompts(encoder, tokenizer, [prompt])[0], rtol=1e-5, atol=1e-6)


def test_threads_take_turns_at_an_encoder():
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    inside, together = [], []

    def enter(*_) -> None:
        together.append(len(inside))
        inside.append(1)
        time.sleep(0.02)

    encoder.register_forward_pre_hook(enter)
    encoder.register_forward_hook(lambda *_: inside.pop() and None)
    threads = [threading.Thread(target=encode_prompts, args=(encoder, tokenizer, [text])) for text in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [0, 0, 0]


def test_long_prompts_are_cut_and_empty_ones_keep_a_token(caplog):
    tokenizer = tiny_tokenizer()
    assert len(tokenize(tokenizer, "x" * 600)) == 512
    assert "only the first 512" in caplog.text
    assert tokenize(tiny_tokenizer(template=None), "") == [tokenizer.eos_token_id]


# --- schedule, guidance, noise ---


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (6, 3.0), (30, 3.0), (50, 4.0), (7, 1.0)])
def test_scheduler_has_the_sigmas_of_flow(steps, shift):
    scheduler = make_scheduler()
    sigmas = set_schedule(scheduler, steps, shift)
    torch.testing.assert_close(sigmas, flow.sigmas(steps, shift), rtol=0, atol=1.2e-7)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(scheduler.timesteps) == steps
    if shift == 3.0:
        assert torch.equal(set_schedule(scheduler, steps), sigmas)  # the configured shift is the default


def test_golden_run():
    from l2p_fast.models.zimage import L2PTransformer2DModel

    config, weights, io, stride = goldens.golden(16)
    model = L2PTransformer2DModel(**config)
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    golden = {k.removeprefix("sample."): v for k, v in io.items() if k.startswith("sample.")}
    pipe = L2PPipeline(model.eval(), None, None, make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(set_schedule(pipe.scheduler, 6)[:-1], golden["sigmas"], rtol=0, atol=1e-6)
    for batched in (True, False):
        final = pipe(
            prompt_embeds=[golden["pos"]],
            negative_prompt_embeds=[golden["neg"]],
            height=128,
            width=128,
            num_inference_steps=6,
            guidance_scale=2.0,
            noise=golden["noise"],
            output_type="latent",
            cfg_batch=batched,
        ).images
        final = final[..., ::stride, ::stride]
        assert (final - golden["final"]).norm() / golden["final"].norm() < 1e-4


def test_run_equals_the_plain_loop_over_forward(pipe):
    prompts, g = ["a red star", "two blue circles above a ring"], 2.5
    noise = torch.randn(2, 3, 32, 48, generator=seeded(1))
    pos = pipe.encode_prompt(prompts)
    neg = pipe.encode_prompt(["blurry", "blurry"])
    x, sigmas = noise, flow.sigmas(3)
    with torch.no_grad():
        for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            v_pos, v_neg = (flow.velocity(pipe.transformer(x, (1 - s).expand(2), caps)) for caps in (pos, neg))
            x = flow.advance(x, flow.guide(v_pos, v_neg, g), s, s_next)
    for batched in (True, False):
        out = pipe(prompts, "blurry", noise=noise, output_type="latent", cfg_batch=batched, **SMALL).images
        assert (out - x).norm() / x.norm() < 1e-5
        assert pipe.cfg_batched is batched


@pytest.mark.parametrize("guidance", (1.0, 2.5))
def test_the_fused_step_is_the_schedulers(pipe, guidance):
    class Scheduler(FlowMatchEulerDiscreteScheduler):
        """Not known to be Euler's, so its own step runs."""

    other = L2PPipeline(pipe.transformer, pipe.text_encoder, pipe.tokenizer, Scheduler(shift=3.0))
    other.set_progress_bar_config(disable=True)
    kept, noise = [], torch.randn(1, 3, 32, 48, generator=seeded(1))
    kwargs = SMALL | {"guidance_scale": guidance, "output_type": "latent"}
    for cfg_batch in (True, False):
        want = other("a red star", noise=noise, cfg_batch=cfg_batch, **kwargs).images
        before = noise.clone()
        assert torch.equal(pipe("a red star", noise=noise, cfg_batch=cfg_batch, **kwargs).images, want)
        assert torch.equal(noise, before)
    kwargs |= {"cfg_batch": False, "callback_on_step_end": lambda p, i, t, k: kept.append(k["latents"]) or {}}
    pipe("a red star", noise=noise, **kwargs)
    assert torch.equal(kept[-1], want) and not torch.equal(kept[0], kept[1])  # states stay as they were given


def test_no_guidance_runs_one_half(pipe, monkeypatch):
    rows = []
    real = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *a, **k: rows.append(len(x)) or real(x, *a, **k))
    pipe("a", **SMALL | {"guidance_scale": 1.0})
    assert rows == [1, 1, 1] and pipe.cfg_batched is None
    rows.clear()
    pipe("a", **SMALL, cfg_batch=False)
    assert rows == [1] * 6
    rows.clear()
    pipe("a", **SMALL)
    assert rows == [2] * 3


def attentive_pipeline() -> L2PPipeline:
    """One whose images depend on the prompts, which those of small random weights hardly do."""
    pipe = tiny_pipeline()
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            weight.mul_(5 if "local_decoder" not in name else 2 if weight.ndim > 1 else 1)
    return pipe


def test_guidance_within_an_interval_alone(monkeypatch):
    """At four steps of shift 3, whose noise levels are 1, 0.9, 0.75 and 0.5."""
    pipe = attentive_pipeline()
    rows, noise = [], torch.randn(2, 3, 32, 48, generator=seeded(1))
    real = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *a, **k: rows.append(len(x)) or real(x, *a, **k))

    def run(interval, g=2.5, **how):
        rows.clear()
        how = SMALL | {"num_inference_steps": 4, "guidance_scale": g, "noise": noise, "output_type": "latent"} | how
        return pipe(["a red star", "two blue circles"], "blurry", guidance_interval=interval, **how).images

    full = run(None)
    assert torch.equal(run((0, 1)), full) and rows == [4] * 4
    assert torch.equal(run((0.6, 0.7)), run(None, g=1.0)) and rows == [2] * 4
    pos, neg, x = pipe.encode_prompt(["a red star", "two blue circles"]), pipe.encode_prompt(["blurry"] * 2), noise
    with torch.no_grad():
        for s, s_next in zip(*(flow.sigmas(4)[i : 4 + i] for i in (0, 1)), strict=True):
            v, v_neg = (flow.velocity(pipe.transformer(x, (1 - s).expand(2), caps)) for caps in (pos, neg))
            x = flow.advance(x, flow.guide(v, v_neg, 2.5) if s in (0.75, flow.sigmas(4)[1]) else v, s, s_next)
    for batched, ran in ((True, [2, 4, 4, 2]), (False, [2, 2, 2, 2, 2, 2])):
        out = run((0.75, 0.9), cfg_batch=batched)
        assert rows == ran and (out - x).norm() / x.norm() < 1e-3 and pipe.cfg_batched is batched
    assert (x - full).norm() / x.norm() > 0.01
    image = PIL.Image.new("RGB", (48, 32), (90, 60, 30))
    run((0.6, 0.8), image=image, strength=0.5)
    assert rows == [4, 2]
    mask = PIL.Image.new("L", (48, 32))
    mask.paste(255, (8, 8, 40, 24))
    run((0.6, 0.8), image=image, mask_image=mask)
    assert rows == [2, 2, 4, 2]


def test_an_image_does_not_depend_on_its_batch(pipe):
    prompts = ["a red star", "a ring left of two green squares"]
    both = pipe(prompts, generator=[seeded(3), seeded(4)], output_type="pt", **SMALL).images
    for i, seed in enumerate((3, 4)):
        alone = pipe(prompts[i], generator=seeded(seed), output_type="pt", **SMALL).images[0]
        torch.testing.assert_close(alone, both[i], rtol=0, atol=1e-5)
    # one generator draws image by image: the first of many is the one drawn alone
    assert torch.equal(draw_noise((3, 3, 16, 16), seeded(5))[:1], draw_noise((1, 3, 16, 16), seeded(5)))
    with pytest.raises(UserError, match="a list of 2"):
        pipe(prompts, generator=[seeded()], **SMALL)


def test_several_images_of_a_prompt_and_output_types(pipe):
    kwargs = {"num_images_per_prompt": 2, **SMALL}
    pil = pipe(["a", "b"], generator=seeded(), **kwargs).images
    assert len(pil) == 4 and pil[0].size == (48, 32) and np.any(np.array(pil[0]) != np.array(pil[1]))
    array = pipe(["a", "b"], generator=seeded(), output_type="np", **kwargs).images
    assert array.shape == (4, 32, 48, 3) and 0 <= array.min() and array.max() <= 1
    assert np.array_equal(np.array(pil[2]), (array[2] * 255).round().astype(np.uint8))
    (tensor,) = pipe(["a", "b"], generator=seeded(), output_type="pt", return_dict=False, **kwargs)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_embeds_instead_of_prompts(pipe):
    wanted = pipe("a star", "fog", generator=seeded(), output_type="pt", **SMALL).images
    pos, neg = pipe.encode_prompt(["a star", "fog"])
    got = pipe(prompt_embeds=[pos], negative_prompt_embeds=[neg], generator=seeded(), output_type="pt", **SMALL).images
    assert torch.equal(got, wanted)
    got = pipe(prompt_embeds=[pos], negative_prompt="fog", generator=seeded(), output_type="pt", **SMALL).images
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    bare = L2PPipeline(pipe.transformer, None, None, make_scheduler())
    with pytest.raises(UserError, match="no text encoder"):
        bare("a star", **SMALL)


def test_defaults():
    small, large = tiny_pipeline(16), tiny_pipeline(64)
    assert (small.default_steps, small.default_guidance_scale) == (30, 2.0)
    assert (large.default_steps, large.default_guidance_scale) == (50, 4.0)
    own = tiny_pipeline(64, default_steps=2, default_guidance_scale=1.0)
    assert (own.default_steps, own.default_guidance_scale) == (2, 1.0)
    steps = []
    own("a", height=64, width=64, callback_on_step_end=lambda p, i, t, k: steps.append(float(t)) or {})
    assert steps == pytest.approx([1000, 750])


# --- image to image, coarse start, callbacks ---


def test_image_to_image(pipe):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    seen = []

    def watch(p, step, t, tensors):
        seen.append((step, round(float(t)), tensors["latents"].shape))

    kwargs = SMALL | {"num_inference_steps": 10, "height": None, "width": None}
    out = pipe("a", image=image, strength=0.3, generator=seeded(), callback_on_step_end=watch, **kwargs).images[0]
    assert out.size == image.size and [s for s, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == round(float(flow.sigmas(10)[7] * 1000))
    # strength 1 keeps nothing of the image
    kwargs = SMALL | {"output_type": "pt"}
    whole = pipe("a", image=image, strength=1.0, generator=seeded(2), **kwargs).images
    torch.testing.assert_close(whole, pipe("a", generator=seeded(2), **kwargs).images, rtol=0, atol=1e-6)
    # array, tensor and PIL are the same image
    pixels = image_to_pixels(image, 32, 48)
    assert torch.equal(pixels, image_to_pixels(np.array(image), 32, 48))
    torch.testing.assert_close(pixels, image_to_pixels((pixels[0] + 1) / 2, 32, 48))
    assert image_to_pixels(image, 64, 16).shape == (1, 3, 64, 16)


def test_image_size_is_the_nearest_valid_one(pipe):
    out = pipe("a", image=PIL.Image.new("L", (50, 30)), num_inference_steps=1).images[0]
    assert out.size == (48, 32)


def test_coarse_start():
    pipe = tiny_pipeline(coarse_size=2, coarse_strength=0.8)
    assert pipe.coarse_resolution(32, 32) is None  # no more than the coarse grid
    assert pipe.coarse_resolution(80, 160) == (16, 32)
    assert pipe.coarse_resolution(80, 160, 0) is None
    seen = []

    def watch(p, step, t, tensors):
        seen.append((p.stage, step, tensors["latents"].shape[-2:]))

    kwargs = {"height": 80, "width": 160, "num_inference_steps": 6, "guidance_scale": 2.0}
    out = pipe("a", generator=seeded(7), output_type="latent", callback_on_step_end=watch, **kwargs).images
    first = int((flow.sigmas(6) > 0.8).sum())
    assert first == 3
    assert [s[0] for s in seen] == ["coarse"] * 6 + ["full"] * 3 and [s[1] for s in seen] == list(range(9))
    assert seen[0][2] == (16, 32) and seen[-1][2] == (80, 160)
    # by hand
    plain, generator = tiny_pipeline(), seeded(7)
    small = plain(
        "a", noise=draw_noise((1, 3, 16, 32), generator), output_type="latent", **kwargs | {"height": 16, "width": 32}
    ).images
    start = torch.nn.functional.interpolate(small.clamp(-1, 1), (80, 160), mode="bicubic").clamp(-1, 1)
    wanted = plain(
        "a",
        image=(start + 1) / 2,
        strength=0.5,
        noise=draw_noise((1, 3, 80, 160), generator),
        output_type="latent",
        **kwargs,
    ).images
    assert (out - wanted).norm() / wanted.norm() < 0.02  # image-to-image clamps the overshoot of the enlargement
    assert len(set(map(str, seen))) == 9
    seen.clear()
    pipe("a", coarse_size=0, callback_on_step_end=watch, **kwargs)
    assert [s[0] for s in seen] == ["full"] * 6


def test_guidance_may_end_with_the_coarse_start(monkeypatch):
    """A limit counts for the full size after a coarse start, and for nothing else."""
    pipe = tiny_pipeline(coarse_size=2, coarse_strength=0.8, full_guidance_scale=1.0)
    assert L2PPipeline(**pipe.components).config.full_guidance_scale == 1.0
    rows, forward = [], type(pipe.transformer).forward

    def note(self, pixels, *args, **kwargs):
        rows.append((pixels.shape[-1], len(pixels)))
        return forward(self, pixels, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", note)
    pipe("a", height=48, width=48, num_inference_steps=4, guidance_scale=2.0)
    assert rows == [(32, 2)] * 4 + [(48, 1)] * 2
    rows.clear()
    pipe("a", height=48, width=48, num_inference_steps=4, guidance_scale=2.0, coarse_size=0)
    assert rows == [(48, 2)] * 4


def test_progress_bar_shows_both_stages(capsys):
    pipe = tiny_pipeline(coarse_size=1)
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    pipe("a", height=48, width=48, num_inference_steps=3, guidance_scale=1.0)
    shown = capsys.readouterr().err
    assert "coarse 16x16" in shown and "full 48x48" in shown and "4/4" in shown


def test_callback_may_replace_the_state_and_stop(pipe):
    def replace(p, step, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    assert (pipe("a", callback_on_step_end=replace, output_type="latent", **SMALL).images == 0).all()
    steps = []

    def stop(p, step, t, tensors):
        steps.append(step)
        p._interrupt = step == 1

    pipe("a", callback_on_step_end=stop, **SMALL)
    assert steps == [0, 1]
    with pytest.raises(UserError, match="latents"):
        pipe("a", callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["vae"], **SMALL)


# --- memory ---


class Greedy(torch.nn.Module):
    """A transformer that runs out of memory unless few enough rows run with narrow enough bands."""

    dtype, device, patch_size, size_multiple = torch.float32, torch.device("cpu"), 16, 16

    def __init__(self, rows: int, memory_mb: float):
        super().__init__()
        self.rows, self.memory_mb = rows, memory_mb
        self.local_decoder = torch.nn.Identity()
        self.local_decoder.memory_mb = self.local_decoder.band_rows = None
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.prepared = []

    @property
    def head(self):
        return self.local_decoder

    def prepare(self, caps, height, width, timesteps=None):
        self.prepared.append(len(caps))
        return torch.stack([cap.mean() for cap in caps])

    def forward(self, pixels, t, cond=None, step=None):
        if len(pixels) > self.rows or (self.local_decoder.memory_mb or 256) > self.memory_mb:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return pixels * cond[:, None, None, None]


@pytest.mark.parametrize(
    ("rows", "memory_mb", "words"),
    [
        (4, 64, ["head bands of 64 MB"]),
        (4, 16, ["head bands of 64 MB", "head bands of 16 MB"]),
        (2, 256, ["64 MB", "16 MB", "two halves of guidance one after the other"]),
        (1, 16, ["64 MB", "16 MB", "one after the other", "one image at a time"]),
    ],
)
def test_out_of_memory_retries_and_says_so(rows, memory_mb, words, caplog):
    caps = [torch.full((2, 4), value) for value in (0.1, 0.2, 0.3, 0.4)]
    run = {"prompt_embeds": caps[:2], "negative_prompt_embeds": caps[2:], "output_type": "latent", **SMALL}
    wanted = L2PPipeline(Greedy(9, 256), None, None, make_scheduler())(generator=seeded(), **run).images
    caplog.clear()
    pipe = L2PPipeline(Greedy(rows, memory_mb), None, None, make_scheduler())
    got = pipe(generator=seeded(), **run).images
    torch.testing.assert_close(got, wanted)
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(said) == len(words) and all(word in line for word, line in zip(words, said, strict=True))
    assert pipe.cfg_batched is (rows == 4)


def test_out_of_memory_for_good_is_raised():
    caps = [torch.zeros(2, 4)]
    pipe = L2PPipeline(Greedy(0, 256), None, None, make_scheduler())
    with pytest.raises(torch.OutOfMemoryError):
        pipe(prompt_embeds=caps, negative_prompt_embeds=caps, **SMALL)
    pipe = L2PPipeline(Greedy(1, 256), None, None, make_scheduler())
    with pytest.raises(torch.OutOfMemoryError):  # a forced batch is not split
        pipe(prompt_embeds=caps, negative_prompt_embeds=caps, cfg_batch=True, **SMALL)


def test_other_errors_are_not_retried(pipe, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(pipe.transformer, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        pipe("a", **SMALL)


def test_offload():
    wanted = tiny_pipeline()("a", generator=seeded(), output_type="pt", **SMALL).images
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # hooks are reset after a run
        assert torch.equal(pipe("a", generator=seeded(), output_type="pt", **SMALL).images, wanted)


def test_prepare_runs_inside_the_hook_of_an_offloaded_model():
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe, events = tiny_pipeline(), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            events.append("load")
            return args, kwargs

        def post_forward(self, module, output):
            events.append("unload")
            return output

    pipe.transformer.cap_embedder.register_forward_hook(lambda *_: events.append("prepare"))
    add_hook_to_module(pipe.transformer, Hook())
    pipe("a", **SMALL)
    assert events == ["load", "prepare", "unload"] + ["load", "unload"] * 3


def test_caches():
    """Steps are skipped within a run; the next run starts anew."""
    pipe, calls = tiny_pipeline(), []
    plain = pipe("a", output_type="np", generator=seeded(), **SMALL).images
    pipe.transformer.layers[-1].attention.to_q.register_forward_hook(lambda *_: calls.append(1))
    for threshold, ran in ((0.0, 3), (1e3, 1)):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        for cfg_batch, rows in (("auto", 1), (False, 2)):
            how = {"cfg_batch": cfg_batch, "output_type": "np"} | SMALL
            runs = [pipe("a", generator=seeded(), **how).images for _ in range(2)]
            assert np.array_equal(*runs) and len(calls) == 2 * ran * rows
            assert threshold or np.abs(runs[0] - plain).max() < 1e-4
            calls.clear()
        pipe.transformer.disable_cache()


@pytest.mark.parametrize("config", (FirstBlockCacheConfig(threshold=0.0), TaylorSeerCacheConfig(cache_interval=1)))
def test_caches_and_guidance_within_an_interval(config):
    """What is kept of the prompts' half is of the step before, whether that had guidance or not."""
    pipe = attentive_pipeline()
    how = SMALL | {"num_inference_steps": 4, "guidance_interval": (0.7, 0.95), "output_type": "np"}
    plain = pipe("a", generator=seeded(), **how).images
    pipe.transformer.enable_cache(config)
    names, enter = [], pipe.transformer.cache_context
    pipe.transformer.cache_context = lambda name: names.append(name[:6]) or enter(name)
    assert np.abs(pipe("a", generator=seeded(), **how).images - plain).max() < 1e-4
    assert names == ["(0, 1)"] + ["(0, 1)", "(1, 2)"] * 2 + ["(0, 1)"]
    with pytest.raises(UserError, match="can't be one batch"):
        pipe("a", cfg_batch=True, **how)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True))
    with pytest.raises(UserError, match="MagCache has a ratio for each step"):
        pipe("a", **how)


# --- files ---


def test_load_first_thing(tmp_path):
    """In a process that has imported nothing else of the package."""
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    program = f"from l2p_fast import L2PPipeline; L2PPipeline.from_pretrained({str(tmp_path / 'pipe')!r})"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_save_and_load(tmp_path):
    pipe = tiny_pipeline(default_steps=2, default_guidance_scale=1.5, coarse_size=4)
    pipe.save_pretrained(tmp_path / "pipe")
    kwargs = {"height": 32, "width": 32, "output_type": "pt"}
    wanted = pipe("a star", generator=seeded(), **kwargs).images
    for loaded in (L2PPipeline.from_pretrained(tmp_path / "pipe"), load_pipeline(tmp_path / "pipe")):
        loaded.set_progress_bar_config(disable=True)
        assert (loaded.default_steps, loaded.default_guidance_scale, loaded.config.coarse_size) == (2, 1.5, 4)
        assert torch.equal(loaded("a star", generator=seeded(), **kwargs).images, wanted)


def test_load_in_another_dtype_and_with_a_text_encoder_of_its_own(tmp_path):
    save_tiny(tmp_path / "pipe", dtype=torch.bfloat16)
    pipe = load_pipeline(tmp_path / "pipe")
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    pipe = load_pipeline(tmp_path / "pipe", torch_dtype=torch.float32)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    part = load_pipeline(tmp_path / "pipe" / "transformer", tmp_path / "pipe")
    part.set_progress_bar_config(disable=True)
    assert part("a", **SMALL).images[0].size == (48, 32)
    with pytest.raises(UserError, match="no text encoder"):
        load_pipeline(tmp_path / "pipe" / "transformer")
    with pytest.raises(UserError, match="Qwen3 text encoder"):
        load_pipeline(tmp_path / "pipe" / "transformer", tmp_path)


# --- wrong arguments ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 1000}, "multiple of 16 .* got 1000; try 992 or 1008"),
        ({"width": 3}, "try 16"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"guidance_interval": (0.5,)}, "guidance_interval must be LOW,HIGH"),
        ({"guidance_interval": (0.8, 0.2)}, "0 <= LOW < HIGH <= 1, got '0.8,0.2'; try"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"strength": 1.5}, "at most 1, got 1.5; try 1"),
        ({"coarse_strength": -0.5}, "above 0"),
        ({"output_type": "jpeg"}, "pil, np, pt"),
        ({"cfg_batch": "maybe"}, "cfg_batch"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"negative_prompt": ["a", "b"]}, "wanted 1 or 1, got 2"),
        ({"prompt": []}, "empty list"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": [3]}, "strings"),
        ({"noise": torch.zeros(1, 3, 16, 16)}, "noise: wanted"),
        ({"image": "x.png"}, "PIL image"),
    ],
)
def test_wrong_arguments(pipe, change, words):
    with pytest.raises(UserError, match=words):
        pipe(**{"prompt": "a", **SMALL, **change})


def test_patch_160_wants_multiples_of_320():
    pipe = L2PPipeline(tiny_transformer(160), None, None, make_scheduler())
    with pytest.raises(UserError, match="multiple of 320 .* got 480; try 320 or 640"):
        pipe(prompt_embeds=[torch.zeros(1, FEATURES)], height=480, width=320)
