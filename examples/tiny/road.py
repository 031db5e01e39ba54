"""The whole road for another source model, in one command and minutes: ``python -m examples.tiny road --source flux2``.

A latent model of the source's class learns one colored thing at 64 px, together with a text encoder of the source's
kind. It draws images; those that are right become the data of the transfer, which is made by the package's own commands
(convert init, train). At the same time, on the same images, a pixel model of the same sizes learns from
nothing. All three are scored on the same prompts.

Smaller than the world of the bundled models (one thing, 16 tokens): it asks whether a source's transfer works, not how
well. Z-Image has its own stages.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.formats.checkpoint import Checkpoint
from l2p_fast.formats.write import save_single_file
from l2p_fast.loading import model_class
from l2p_fast.models.qwen_image import CUT, TEMPLATE
from l2p_fast.models.text import template_prompt
from l2p_fast.ops import to_uint8
from l2p_fast.sampling import flow
from l2p_fast.sampling.pipeline import L2PPipeline, load_pipeline
from l2p_fast.training.data import Features, make_features
from l2p_fast.training.monitor import read_log

from .autoencoder import PatchAutoencoder
from .corpus import write_table
from .fit import Optimizer, fit
from .ldm import CHAT_TEMPLATE
from .score import contact_sheet
from .scorer import matches, read
from .world import COLORS, SHAPES, Group, Prompt, draw, draw_scene

SIDE, TOKENS, BATCH = 64, 4, 24
SHIFT, STEPS, GUIDANCE = 4.0, 16, 2.0
WIDTH = {"num_attention_heads": 3, "attention_head_dim": 32}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "use_cache": False}  # fmt: skip
TEXT_TOKENS = 16  # of a prompt, where a source attends its padding
PROMPTS = [Prompt((Group(1, shape, color),), task="colors") for color in COLORS for shape in SHAPES]
OF_PIXELS = {"text_tokens": TEXT_TOKENS, "x0_floor": 0.1}  # a small head need not carry the noise through
SAVE_EVERY = 200  # steps of the pixel models
RATES = {"source": 2e-3, "transfer": 2e-3, "scratch": 2e-3}


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in Qwen's class: every word of the prompts and of Qwen-Image's instruction is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([TEMPLATE, "user\n assistant\n", *(prompt.text for prompt in PROMPTS)] * 8, trainer)
    vocab = dict(sorted(bpe.get_vocab().items(), key=lambda kv: kv[1]))
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]],
        pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Source(nn.Module):
    """A latent model with its text encoder. Latents (B, 16, 8, 8) are packed into 4 x 4 tokens of 64 channels."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer, self.text = self.build(-(-len(tokenizer) // 64) * 64)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text features (B, L, C) with gradients, and a mask (B, L)."""
        raise NotImplementedError

    def velocity(self, x: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """eps - x0 of latents (B, 16, 8, 8)."""
        tokens = F.pixel_unshuffle(x, 2).flatten(2).mT
        out = self.call(tokens, sigma, text, mask)
        return F.pixel_shuffle(out.mT.unflatten(2, (TOKENS, TOKENS)), 2)

    def ids(self, texts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        how = {"padding": True} if length is None else {"padding": "max_length", "max_length": length}
        found = self.tokenizer(list(texts), return_tensors="pt", **how)
        return found["input_ids"], found["attention_mask"]


class Flux2(Source):
    def build(self, vocabulary: int) -> tuple[nn.Module, nn.Module]:
        transformer = Flux2Transformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=3, joint_attention_dim=3 * TEXT["hidden_size"],
            axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False, **WIDTH,
        )  # fmt: skip
        return transformer, Qwen3Model(Qwen3Config(vocab_size=vocabulary, num_hidden_layers=4, head_dim=32, **TEXT))

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        texts = [template_prompt(self.tokenizer, prompt, thinking=False) for prompt in prompts]
        ids, mask = self.ids(texts, TEXT_TOKENS)
        states = self.text(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.cat(states[1:4], dim=-1), torch.ones_like(mask)

    def call(self, tokens: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        places = torch.zeros(TOKENS, TOKENS, 4)
        places[..., 1], places[..., 2] = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
        of_text = torch.zeros(text.shape[1], 4)
        of_text[:, 3] = torch.arange(text.shape[1])
        return self.transformer(tokens, text, sigma, places.flatten(0, 1), of_text, return_dict=False)[0]


class QwenImage(Source):
    def build(self, vocabulary: int) -> tuple[nn.Module, nn.Module]:
        transformer = QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=4, joint_attention_dim=TEXT["hidden_size"],
            axes_dims_rope=(8, 12, 12), **WIDTH,
        )  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
        config = Qwen2_5_VLTextConfig(vocab_size=vocabulary, num_hidden_layers=2, rope_parameters=rope, **TEXT)
        return transformer, Qwen2_5_VLTextModel(config)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.ids([TEMPLATE.format(prompt) for prompt in prompts])
        states = self.text(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        return states[:, CUT:], mask[:, CUT:]

    def call(self, tokens: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        shapes = [[(1, TOKENS, TOKENS)]] * len(tokens)
        return self.transformer(tokens, text, mask, sigma, shapes, return_dict=False)[0]


SOURCES: dict[str, type[Source]] = {"flux2": Flux2, "qwen_image": QwenImage}


def train_source(folder: Path, source: str, minutes: float, pictures: int) -> None:
    """Autoencoder, latents, then the latent model and its text encoder together, as a source folder."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    which = rng.integers(len(PROMPTS), size=pictures)
    images = torch.stack([torch.from_numpy(draw(draw_scene(rng, PROMPTS[i]), SIDE, SIDE)) for i in which])
    vae = PatchAutoencoder.fit(images)
    latents, which = vae.encode(images), torch.from_numpy(which)
    model = SOURCES[source](build_tokenizer())
    texts = [*(prompt.text for prompt in PROMPTS), ""]

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        pick = torch.randint(pictures, (BATCH,), generator=rng)
        x0, label = latents[pick], which[pick]
        noise, u = torch.randn(x0.shape, generator=rng), torch.rand(BATCH, generator=rng)
        label = torch.where(torch.rand(BATCH, generator=rng) < 0.9, label, len(PROMPTS))
        sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(min=0.02)
        seen, place = label.unique(return_inverse=True)
        text, mask = (part[place] for part in model.encode([texts[i] for i in seen]))
        return F.mse_loss(model.velocity(flow.add_noise(x0, noise, sigma), sigma, text, mask), noise - x0)

    optimizer = Optimizer(model.named_parameters(), RATES["source"], lambda *_: False)
    (folder / "latent").mkdir(parents=True, exist_ok=True)
    fit("latent model", model, optimizer, loss_of, folder=folder / "latent", minutes=minutes, ema_decay=0.99)
    vae.save_pretrained(folder / "vae")
    save_folder(model, folder / "source")


def save_folder(model: Source, place: Path) -> None:
    """A folder as sources are published; what its pixel models have of their own stands in the configuration."""
    with atomic_path(place) as temporary:
        model.transformer.save_pretrained(temporary / "transformer")
        model.text.save_pretrained(temporary / "text_encoder")
        model.tokenizer.save_pretrained(temporary / "tokenizer")
        path = temporary / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | OF_PIXELS))


def load_source(folder: Path, source: str) -> tuple[Source, PatchAutoencoder]:
    model = SOURCES[source](build_tokenizer())
    model.transformer = type(model.transformer).from_pretrained(folder / "source" / "transformer")
    model.text = type(model.text).from_pretrained(folder / "source" / "text_encoder")
    return model.eval(), PatchAutoencoder.from_pretrained(folder / "vae")


@torch.no_grad()
def draw_source(
    model: Source, vae: PatchAutoencoder, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """64-px images by the latent model, one for each prompt and seed."""
    x = torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    (text, mask), (none, no_mask) = model.encode(prompts), model.encode([""] * len(prompts))
    levels = flow.sigmas(STEPS, SHIFT)
    for sigma, after in zip(levels, levels[1:], strict=False):
        at = sigma.expand(len(x))
        v = flow.guide(model.velocity(x, at, text, mask), model.velocity(x, at, none, no_mask), GUIDANCE)
        x = flow.advance(x, v, sigma, after)
    return [Image.fromarray(pixels.numpy()) for pixels in to_uint8(vae.decode(x)[0])]


def draw_corpus(folder: Path, source: str, count: int) -> int:
    """Images by the source; those that show what was asked are listed. Returns how many.

    Raises:
        UserError: none does.
    """
    corpus = folder / "corpus"
    if (corpus / "metadata.csv").exists():
        with open(corpus / "metadata.csv", newline="") as file:
            return sum(1 for _ in csv.DictReader(file))
    model, vae = load_source(folder, source)
    corpus.mkdir(exist_ok=True)
    rows = []
    for start in tqdm(range(0, count, BATCH), desc="corpus", disable=not sys.stderr.isatty()):
        seeds = range(start, min(start + BATCH, count))
        asked = [PROMPTS[seed % len(PROMPTS)] for seed in seeds]
        images = draw_source(model, vae, [prompt.text for prompt in asked], seeds)
        for seed, prompt, image in zip(seeds, asked, images, strict=True):
            if matches(prompt, read(image)):
                image.save(corpus / f"{seed:05d}.png")
                rows.append((f"{seed:05d}.png", prompt.text, seed))
    if not rows:
        raise UserError(f"none of {count} images by the latent model is right; give it more --minutes")
    write_table(corpus / "metadata.csv", rows)
    return len(rows)


def begin(*words: str | Path) -> subprocess.Popen:
    """One of the package's commands, begun."""
    return subprocess.Popen([sys.executable, "-m", "l2p_fast", *map(str, words)])


def end(*running: subprocess.Popen) -> None:
    """Wait for commands; where one fails, the others are ended, too."""
    try:
        for one in running:
            if one.wait():
                raise UserError(f"l2p {' '.join(one.args[3:5])} failed; see above")
    finally:
        for one in running:
            if one.poll() is None:
                one.terminate()  # a training saves its state
                one.wait()


def transfer(folder: Path, source: str, minutes: float) -> None:
    """Both pixel models by ``l2p train``, at the same time on the same machine."""
    start, nothing = base_of(folder, "transfer"), base_of(folder, "scratch")
    if not start.exists():
        end(begin("convert", "init", folder / "source", "--res", "1k", "--head-width", "0.25", "--out", start))
    if not nothing.exists():
        torch.manual_seed(1)
        save_single_file(model_class(source)(**Checkpoint(start).l2p_config()), nothing)
    features = Features(folder / "features")
    texts = features.missing(["", *(prompt.text for prompt in PROMPTS)])
    if texts:
        make_features(features, texts, folder / "source", torch.device("cpu"), source, TEXT_TOKENS)
    running = []
    for name, policy in (("transfer", {"policy": "paper", "n": 1}), ("scratch", {"policy": "full"})):
        if (folder / name / "trained-ema.safetensors").exists():
            continue
        config = {
            "run": str(folder / name), "steps": 1_000_000, "minutes": minutes, "save_every": SAVE_EVERY,
            "freeze": policy,
            "model": {"base": str(base_of(folder, name)), "weights": "float32", "compute": "float32"},
            "objective": {"sigma": "continuous", "shift": SHIFT, "noise": "fresh", "pyramid": 0.25},
            "data": {"path": str(folder / "corpus"), "caption_dropout": 0.1, "features": str(folder / "features"),
                     "workers": 1, "grids": [{"tokens": TOKENS**2, "batch": BATCH}]},
            "optim": {"kind": "adamw", "lr": RATES[name], "betas": [0.9, 0.95], "schedule": "cosine", "warmup": 20,
                      "clip": 1.0},
            "ema": {"decay": 0.98}, "memory": {"checkpointing": False, "head_mb": 1000}, "log": {"board": "none"},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        running.append(begin("train", folder / f"{name}.yaml"))
    end(*running)


def base_of(folder: Path, name: str) -> Path:
    return folder / {"transfer": "init.safetensors", "scratch": "nothing.safetensors"}[name]


def trained(folder: Path, name: str) -> L2PPipeline:
    """A pixel model with the averaged weights of its run."""
    pipe = load_pipeline(base_of(folder, name), folder / "source")
    state = load_file(folder / name / "trained-ema.safetensors")
    pipe.transformer.load_state_dict(pipe.transformer.state_dict() | state)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def score(folder: Path, source: str, seeds: int) -> dict:
    """Shares of images that show exactly what was asked: source, transfer, from nothing."""
    prompts = [prompt for prompt in PROMPTS for _ in range(seeds)]
    numbers, texts = range(10_000, 10_000 + len(prompts)), [prompt.text for prompt in prompts]
    drawn = {"source": draw_source(*load_source(folder, source), texts, numbers)}
    for name in ("transfer", "scratch"):
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        drawn[name] = trained(folder, name)(
            texts, height=SIDE, width=SIDE, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            shift=SHIFT,
        ).images  # fmt: skip
    told: dict = {"class": source, "prompts": len(prompts)}
    for name, images in drawn.items():
        right = np.array([matches(prompt, read(image)) for prompt, image in zip(prompts, images, strict=True)], float)
        of_prompt = right.reshape(len(PROMPTS), seeds).mean(axis=1)
        told[name] = round(float(right.mean()), 3)
        told[f"{name} error"] = round(float(of_prompt.std(ddof=1) / len(PROMPTS) ** 0.5), 3)
    shown = list(range(0, len(prompts), max(1, len(prompts) // 10)))[:10]
    sheet = contact_sheet((images[i] for images in drawn.values() for i in shown), len(shown), side=96)
    with atomic_path(folder / "sheet.png") as temporary:
        sheet.save(temporary, "PNG")
    return told


TITLES = {
    "source": "latent source", "transfer": "pixel model, transferred",
    "scratch": "pixel model, from nothing, in the same time",
}  # fmt: skip


def table(told: dict) -> str:
    """The result as a page's table; the rows of the sheet are its rows."""
    lines = ["| model | minutes | steps | parameters | of which trained | right |", "|---|---|---|---|---|---|"]
    for name, title in TITLES.items():
        of = {key: told[f"{name} {key}"] for key in ("steps", "parameters", "trained")}
        right = f"{told[name]:.1%} ± {told[f'{name} error']:.1%}"
        counts = f"{of['parameters'] / 1e6:.2f} M | {of['trained'] / 1e6:.2f} M"
        lines.append(f"| {title} | {told['minutes of each']:g} | {of['steps']} | {counts} | {right} |")
    return "\n".join(lines) + "\n"


def sizes(folder: Path, source: str) -> dict[str, int]:
    """Steps, parameters and how many of them were trained, of the three models."""
    model, _ = load_source(folder, source)
    whole = sum(p.numel() for p in model.transformer.parameters())
    steps = torch.load(folder / "latent" / "state.pt", weights_only=True)["step"]
    found = {"source steps": steps, "source parameters": whole, "source trained": whole}
    for name in ("transfer", "scratch"):
        state = load_file(folder / name / "trained-ema.safetensors")
        found[f"{name} steps"] = read_log(folder / name)[-1]["step"]
        found[f"{name} parameters"] = sum(np.prod(shape) for shape in Checkpoint(base_of(folder, name)).shapes.values())
        found[f"{name} trained"] = sum(tensor.numel() for tensor in state.values())
    return {name: int(value) for name, value in found.items()}


def run(folder: Path, source: str, minutes: float, pictures: int, count: int, seeds: int) -> dict:
    """All stages; half of ``minutes`` for the latent model, half for the two pixel models, which train side by side.

    Each stage goes on where it was stopped. The result is ``road.json``, as a table ``road.md``, with ``sheet.png``.
    """

    def say(words: str) -> None:
        print(f"road of {source}: {words}", flush=True)

    if not (folder / "source").exists():
        say(f"1 of 4, the latent model: {minutes / 2:g} minutes; its losses are in {folder / 'latent' / 'log.jsonl'}")
        train_source(folder, source, minutes / 2, pictures)
    say(f"2 of 4, its images: {count}")
    kept = draw_corpus(folder, source, count)
    say(f"3 of 4, {kept} images are right; both pixel models learn from them: {minutes / 2:g} minutes")
    transfer(folder, source, minutes / 2)
    say("4 of 4, scores")
    told = {"images kept": kept, "images drawn": count, "minutes of each": minutes / 2}
    told |= score(folder, source, seeds) | sizes(folder, source)
    for name, text in (("road.json", json.dumps(told, indent=1) + "\n"), ("road.md", table(told))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text)
    print(table(told), end="", flush=True)
    return told
