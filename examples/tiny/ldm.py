"""The latent source model: an autoencoder, then a small Z-Image transformer with its text encoder, from scratch.

All parts are the classes that the published Z-Image uses (AutoencoderKL, ZImageTransformer2DModel, Qwen3Model), so
that what is tried here holds there. Pictures are 256 px, latents 16 x 16 x 16, the transformer sees 8 x 8 tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from l2p_fast.files import atomic_path
from l2p_fast.models.text import tokenize
from l2p_fast.sampling import flow

from .fit import Optimizer, fit
from .world import COLORS, COUNTS, RELATIONS, SHAPES, draw, draw_prompt, draw_scene, labels

SIDE = 256
BATCH = 48
TOKENS = 8  # of a side
# Noise levels of training (logit-normal) and sampling (shift). With 4,096 numbers in a latent, most of the layout is
# decided between sigma 0.97 and 0.85, so that is where the training looks.
SIGMA_LOGIT, SIGMA_SPREAD, SHIFT = 1.5, 1.1, 5.0
# A linear probe behind this layer must say what each token shows (`world.labels`): meant to tie words to places sooner
# than the velocity alone (as REPA, Yu et al. 2024, with the renderer's knowledge for features).
PROBE_LAYER, PROBE_WEIGHT = 4, 0.1
# Counting and relations are learnt last, so they are shown most.
TASK_SHARES = {
    "single_object": 0.07, "two_object": 0.14, "counting": 0.20, "colors": 0.07,
    "position": 0.24, "color_attr": 0.14, "free": 0.14,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_pictures(*seed: int):
    """Endless (prompt, scene, generator) in the shares of `TASK_SHARES`."""
    rng = np.random.default_rng(seed)
    tasks, shares = list(TASK_SHARES), list(TASK_SHARES.values())
    while True:
        prompt = draw_prompt(rng, str(rng.choice(tasks, p=shares)))
        yield prompt, draw_scene(rng, prompt), rng


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in Qwen's class whose merges make every word of the world one token."""
    words = [*COUNTS, *COLORS, *SHAPES, *(s + "s" for s in SHAPES), "and", *" ".join(RELATIONS).split()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["user\n assistant\n", *words, *(f" {word}" for word in words)] * 8, trainer)
    vocab = bpe.get_vocab()
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=dict(sorted(vocab.items(), key=lambda kv: kv[1])), merges=merges,
        pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """Three layers of 128, of which the features (`hidden_states[-2]`) use two."""
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return Qwen3Model(config)


def build_transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=192, n_layers=8, n_refiner_layers=2,
        n_heads=3, n_kv_heads=3, cap_feat_dim=128, axes_dims=[16, 24, 24], axes_lens=[512, 64, 64],
    )  # fmt: skip


def build_vae() -> AutoencoderKL:
    widths = (16, 32, 48, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=widths, layers_per_block=1, latent_channels=16, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0, shift_factor=0.0, sample_size=SIDE,
    )  # fmt: skip


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def text_features(encoder: Qwen3Model, ids: list[Tensor]) -> list[Tensor]:
    """As `l2p_fast.models.text.encode_prompts`, with gradients: features (L_i, 128) of token ids (L_i,)."""
    batch = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(encoder.device)
    hidden = encoder(input_ids=batch, output_hidden_states=True).hidden_states[-2]
    return [row[: len(row_ids)] for row, row_ids in zip(hidden, ids, strict=True)]


def train_vae(folder: Path, device: torch.device, minutes: float) -> None:
    """Train the autoencoder on 128-px crops around things (it has no attention, so crops are as good as pictures)."""
    torch.manual_seed(0)
    vae = build_vae().to(device)

    def crop(pictures) -> Tensor:
        _, scene, rng = next(pictures)
        thing = scene[int(rng.integers(len(scene)))]
        corner = [int(np.clip((c + rng.normal() * 0.12) * SIDE - 64, 0, SIDE - 128)) for c in (thing.y, thing.x)]
        return torch.from_numpy(draw(scene, SIDE, SIDE, (*corner, 128, 128)))

    def loss_of(step: int) -> Tensor:
        pictures = random_pictures(0, step)
        x = torch.stack([crop(pictures) for _ in range(16)]).to(device)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            latent = posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn_like(posterior.mean)
            out = vae.decode(latent).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return F.l1_loss(out, x) + F.mse_loss(out, x) + 1e-4 * kl

    optimizer = Optimizer(vae.named_parameters(), 2e-3, lambda name, p: False)
    fit("autoencoder", vae, optimizer, loss_of, folder=folder, minutes=minutes, ema_decay=0.99)
    with torch.no_grad(), autocast(device):
        pictures = random_pictures(1)
        x = torch.stack([torch.from_numpy(draw(next(pictures)[1], SIDE, SIDE)) for _ in range(64)]).to(device)
        latents = torch.cat([vae.encode(part).latent_dist.mean.float() for part in x.split(8)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    with atomic_path(folder / "vae") as temporary:
        vae.to("cpu", torch.float32).save_pretrained(temporary)


def encode_pictures(folder: Path, device: torch.device, count: int) -> None:
    """Draw and encode the training pictures once: latents and labels (`.safetensors`), one prompt a line (`.txt`)."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device).eval()
    pictures, latents, known, prompts = random_pictures(2), [], [], []
    with torch.no_grad(), tqdm(total=count, desc="latents", disable=not sys.stderr.isatty()) as bar:
        while len(latents) < count:
            some = [next(pictures) for _ in range(16)]
            x = torch.stack([torch.from_numpy(draw(scene, SIDE, SIDE)) for _, scene, _ in some]).to(device)
            with autocast(device):
                mean = vae.encode(x).latent_dist.mean.float()
            latents += ((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu()
            known += [torch.from_numpy(labels(scene, TOKENS)) for _, scene, _ in some]
            prompts += [prompt.text for prompt, _, _ in some]
            bar.update(len(some))
    with atomic_path(folder / "prompts.txt") as temporary:
        temporary.write_text("\n".join(prompts) + "\n")
    with atomic_path(folder / "latents.safetensors") as temporary:
        save_file({"latents": torch.stack(latents), "labels": torch.stack(known)}, temporary)


def train_transformer(folder: Path, device: torch.device, minutes: float) -> None:
    """Train transformer and text encoder together: velocity and probe loss, a tenth of the captions dropped."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = nn.ModuleDict({"transformer": build_transformer(), "text": build_text_encoder(tokenizer)})
    width = model["transformer"].config.dim
    model["probe"] = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 1 + len(SHAPES) * len(COLORS)))
    model.to(device)
    seen: list[Tensor] = []
    hook = model["transformer"].layers[PROBE_LAYER].register_forward_hook(lambda _, __, out: seen.append(out))
    data = load_file(folder / "latents.safetensors")
    latents, known = data["latents"], data["labels"]
    prompts = (folder / "prompts.txt").read_text().splitlines()
    ids = {text: torch.tensor(tokenize(tokenizer, text)) for text in {"", *prompts}}
    order = torch.Generator()

    def loss_of(step: int) -> Tensor:
        order.manual_seed(step)  # not only at the start: a resumed run must not see the same again
        pick = torch.randint(len(prompts), (BATCH,), generator=order)
        x0 = latents[pick].float().to(device)
        texts = ["" if torch.rand((), generator=order) < 0.1 else prompts[i] for i in pick.tolist()]
        sigma = torch.sigmoid(SIGMA_LOGIT + SIGMA_SPREAD * torch.randn(BATCH, generator=order)).to(device)
        noise = torch.randn(x0.shape, generator=order).to(device)
        x = flow.add_noise(x0, noise, sigma[:, None, None, None])
        with autocast(device):
            features = text_features(model["text"], [ids[text] for text in texts])
            raw = model["transformer"](list(x.unsqueeze(2)), 1 - sigma, features, patch_size=2, return_dict=False)[0]
            said = model["probe"](seen.pop()[:, : TOKENS**2])  # picture tokens come before text tokens
        velocity_loss = F.mse_loss(torch.stack(list(raw)).squeeze(2).float(), x0 - noise)
        return velocity_loss + PROBE_WEIGHT * F.cross_entropy(
            said.float().flatten(0, 1), known[pick].flatten().long().to(device)
        )

    def matrices(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and "layers." in name and "adaLN" not in name or "refiner." in name and p.ndim == 2

    optimizer = Optimizer(model.named_parameters(), 1e-3, matrices)
    fit("latent model", model, optimizer, loss_of, folder=folder / "dit", minutes=minutes)
    hook.remove()
    pipeline = ZImagePipeline(
        transformer=model["transformer"].cpu(), text_encoder=model["text"].cpu(), tokenizer=tokenizer,
        vae=AutoencoderKL.from_pretrained(folder / "vae"), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )  # fmt: skip
    with atomic_path(folder / "source") as temporary:
        pipeline.save_pretrained(temporary)


def run(folder: Path, device: torch.device, vae_minutes: float, minutes: float, pictures: int) -> None:
    """All stages, each skipped when its result is there."""
    (folder / "dit").mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        train_vae(folder, device, vae_minutes)
    if not (folder / "latents.safetensors").exists():
        encode_pictures(folder, device, pictures)
    if not (folder / "source").exists():
        train_transformer(folder, device, minutes)
