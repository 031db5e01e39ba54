"""The latent source model: principal components of patches, then a small Z-Image transformer with its text encoder.

Transformer and text encoder are the classes that the published Z-Image uses (ZImageTransformer2DModel, Qwen3Model), so
that what is tried here holds there; autoencoder.py says why the autoencoder is not. Images are 128 px, latents
16 x 16 x 16, the transformer sees 8 x 8 tokens. Training begins from nothing, or from the blocks and the text encoder
of a pixel model (``start``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.models.blocks import SEQUENCE_MULTIPLE
from l2p_fast.models.text import tokenize
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.sampling import flow

from . import flat
from .autoencoder import PatchAutoencoder
from .fit import Optimizer, fast_dtype, fit
from .world import COLORS, COUNTS, RELATIONS, SHAPES, draw, draw_prompt, draw_scene, labels

SIDE = 128
BATCH = 32
TOKENS = 8  # of a side
PCA_IMAGES = 3000
RATE = 1e-3
# The shift of the noise levels, of training and sampling alike. The components are not scaled to variance 1, so the
# layout is decided where it is for pixels: at sigma 0.98 to 0.85.
SHIFT = 6.0
# A linear probe behind this layer must say what each token shows (`world.labels`): meant to tie words to places sooner
# than the velocity alone (as REPA, Yu et al. 2024, with the renderer's knowledge for features).
PROBE_LAYER, PROBE_WEIGHT = 4, 0.1
# One thing alone is drawn large and moves about most, so its outline is learned last.
TASK_SHARES = {
    "single_object": 0.2, "two_object": 0.1, "counting": 0.1, "colors": 0.28,
    "position": 0.12, "color_attr": 0.1, "free": 0.1,
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


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


def train_autoencoder(folder: Path) -> None:
    pictures = random_pictures(1)
    images = [torch.from_numpy(draw(next(pictures)[1], SIDE, SIDE)) for _ in range(PCA_IMAGES)]
    with atomic_path(folder / "vae") as temporary:
        PatchAutoencoder.fit(torch.stack(images)).save_pretrained(temporary)


def encode_pictures(folder: Path, count: int) -> None:
    """Draw and encode the training images once: latents and labels (`.safetensors`), one prompt a line (`.txt`)."""
    vae = PatchAutoencoder.from_pretrained(folder / "vae")
    pictures, latents, known, prompts = random_pictures(2), [], [], []
    for _ in tqdm(range(count), desc="latents", disable=not sys.stderr.isatty()):
        prompt, scene, _ = next(pictures)
        latents.append(vae.encode(torch.from_numpy(draw(scene, SIDE, SIDE))[None])[0].half())
        known.append(torch.from_numpy(labels(scene, TOKENS)))
        prompts.append(prompt.text)
    with atomic_path(folder / "prompts.txt") as temporary:
        temporary.write_text("\n".join(prompts) + "\n")
    with atomic_path(folder / "latents.safetensors") as temporary:
        save_file({"latents": torch.stack(latents), "labels": torch.stack(known)}, temporary)


def begin_from(start: Path, model: nn.ModuleDict, vae: PatchAutoencoder) -> None:
    """Blocks and text encoder of a pixel model of the same sizes; its patch embedding as seen through the latents."""
    pixel = L2PTransformer2DModel.from_pretrained(start / "transformer", dtype=torch.float32)
    transformer, side = model["transformer"], pixel.patch_size // 2
    if side != vae.config.patch:
        raise UserError(f"--start must be a model of patch {2 * vae.config.patch}, got patch {pixel.patch_size}")
    state, known = transformer.state_dict(), pixel.state_dict()
    state |= {key: value for key, value in known.items() if key in state and value.shape == state[key].shape}
    weight = known[f"all_x_embedder.{2 * side}-1.weight"].unflatten(1, (2, side, 2, side, 3))
    weight = torch.einsum("darbsc,crsk->dabk", weight, vae.basis.detach().unflatten(0, (3, side, side)))
    state["all_x_embedder.2-1.weight"] = weight.flatten(1)
    state["all_x_embedder.2-1.bias"] = known[f"all_x_embedder.{2 * side}-1.bias"]
    transformer.load_state_dict(state)
    encoder = Qwen3Model.from_pretrained(start / "text_encoder", dtype=torch.float32)
    model["text"].load_state_dict(encoder.state_dict())


class Batches:
    """Random batches of encoded images: everything that depends on the step alone.

    Args:
        folder: with `latents.safetensors` and `prompts.txt`.
    """

    def __init__(self, folder: Path, tokenizer: Qwen2Tokenizer, device: torch.device):
        data = load_file(folder / "latents.safetensors")
        self.latents, self.labels, self.device = data["latents"], data["labels"], device
        prompts = (folder / "prompts.txt").read_text().splitlines()
        texts = {text: i for i, text in enumerate(["", *dict.fromkeys(prompts)])}  # 0: no caption
        self.ids = torch.zeros(len(texts), SEQUENCE_MULTIPLE, dtype=torch.long)
        self.lengths = torch.zeros(len(texts), dtype=torch.long)
        for text, i in texts.items():
            ids = tokenize(tokenizer, text)
            self.ids[i, : len(ids)], self.lengths[i] = torch.tensor(ids), len(ids)
        self.text_of = torch.tensor([texts[prompt] for prompt in prompts])

    def __call__(self, step: int, captions: float = 0.9) -> tuple[Tensor, ...]:
        """x0, noise, sigma, token ids and their lengths, labels; a share ``captions`` keeps its text."""
        rng = torch.Generator().manual_seed(step)  # a resumed run must not see the same again
        pick = torch.randint(len(self.latents), (BATCH,), generator=rng)
        x0 = self.latents[pick].float()
        noise = torch.randn(x0.shape, generator=rng)
        u = torch.rand(BATCH, generator=rng)
        sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(min=0.02)
        text = torch.where(torch.rand(BATCH, generator=rng) < captions, self.text_of[pick], 0)
        batch = x0, noise, sigma, self.ids[text], self.lengths[text], self.labels[pick].long()
        return tuple(part.to(self.device) for part in batch)


def train_transformer(folder: Path, device: torch.device, minutes: float, start: Path | None) -> None:
    """Train transformer and text encoder together: velocity and probe loss, a tenth of the captions dropped."""
    torch.manual_seed(0)
    tokenizer, vae = build_tokenizer(), PatchAutoencoder.from_pretrained(folder / "vae")
    model = nn.ModuleDict({"transformer": build_transformer(), "text": build_text_encoder(tokenizer)})
    if start is not None:
        begin_from(start, model, vae)
    transformer = model["transformer"]
    width = transformer.config.dim
    model["probe"] = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 1 + len(SHAPES) * len(COLORS)))
    model.to(device)
    batches = Batches(folder, tokenizer, device)
    image, joint = (tuple(table.to(device) for table in rope) for rope in flat.ropes(transformer, TOKENS))

    def predict(x: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features = model["text"](input_ids=ids, output_hidden_states=True).hidden_states[-2]
        return flat.forward(transformer, x, 1 - sigma, features, lengths, image, joint, PROBE_LAYER)

    def loss_of(step: int) -> Tensor:
        x0, noise, sigma, ids, lengths, known = batches(step)
        with autocast(device):
            raw, seen = predict(flow.add_noise(x0, noise, sigma), sigma, ids, lengths)
            said = model["probe"](seen)
        velocity_loss = F.mse_loss(raw.float(), flow.target(x0, noise))
        return velocity_loss + PROBE_WEIGHT * F.cross_entropy(said.float().flatten(0, 1), known.flatten())

    if start is not None and not (folder / "dit" / "state.pt").exists():
        fit_readout(transformer, batches, predict)

    def matrices(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and ("layers." in name or "refiner." in name) and "adaLN" not in name

    # The features are the last hidden state but one, so the last layer learns nothing.
    model["text"].layers[-1].requires_grad_(False), model["text"].norm.requires_grad_(False)
    optimizer = Optimizer(model.named_parameters(), RATE, matrices)
    fit("latent model", model, optimizer, loss_of, folder=folder / "dit", minutes=minutes, ema_decay=0.998)
    pipeline = ZImagePipeline(
        transformer=transformer.cpu(), text_encoder=model["text"].cpu(), tokenizer=tokenizer, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )  # fmt: skip
    with atomic_path(folder / "source") as temporary:
        pipeline.save_pretrained(temporary)


@torch.no_grad()
def fit_readout(transformer: ZImageTransformer2DModel, batches: Batches, predict, count: int = 12) -> None:
    """The last layer by least squares on ``count`` batches: it is all that a pixel model's blocks lack."""
    last, inputs = transformer.all_final_layer["2-1"], []
    for p in last.adaLN_modulation.parameters():
        p.zero_()
    hook = last.linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0].float().flatten(0, 1)))
    squares = products = 0
    for step in range(count):
        x0, noise, sigma, ids, lengths, _ = batches(2**31 + step, captions=1.0)
        with autocast(x0.device):
            predict(flow.add_noise(x0, noise, sigma), sigma, ids, lengths)
        x = F.pad(inputs.pop(), (0, 1), value=1.0)
        target = flow.target(x0, noise).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
        squares, products = squares + x.T @ x, products + x.T @ target.reshape(len(x), -1)
    hook.remove()
    found = torch.linalg.solve(squares + torch.eye(len(squares), device=squares.device), products)
    last.linear.weight.copy_(found[:-1].T)
    last.linear.bias.copy_(found[-1])


def run(folder: Path, device: torch.device, minutes: float, pictures: int, start: Path | None = None) -> None:
    """All stages, each skipped when its result is there."""
    (folder / "dit").mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        train_autoencoder(folder)
    if not (folder / "latents.safetensors").exists():
        encode_pictures(folder, pictures)
    if not (folder / "source").exists():
        train_transformer(folder, device, minutes, start)
