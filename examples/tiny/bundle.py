"""The bundled pixel models: the source's transformer as it is, and a Detailer Head trained on crops.

The source's latents are an orthogonal projection of the pixels (autoencoder.py), so its patch embedding after that
projection is one for pixels, and the transformer says of a noisy image what it says of its noisy latent, at the same
noise level. Nothing of it is trained. Larger images, and larger patches, are read as their means (``read_mean``), so
they find the same transformer, too.

Only the head is new. It predicts the clean image (``x0_floor``). Its training images are the renderer's, of any size:
a crop at full resolution, and the whole small image that the transformer reads, whose noise agrees with the crop's.

The patch-64 head contains the patch-16 one, which works at a quarter of its size: its inner levels are that head's, and
stay as they are. Only the two outer levels are trained, and what stands between, which is also told what the smaller
head has there.

P patch size, R side of the whole image in pixels, S side of the small image.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.models.detailer import DetailerHead
from l2p_fast.models.text import encode_prompts
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.sampling import flow
from l2p_fast.sampling.pipeline import L2PPipeline, make_scheduler

from .autoencoder import PatchAutoencoder
from .corpus import load_source
from .fit import Optimizer, fit
from .ldm import SIDE, TOKENS, autocast, random_pictures
from .world import draw

READ_PATCH = SIDE // TOKENS  # the patch whose embedding is inherited


class Recipe(NamedTuple):
    """How a head of one patch size is trained and sampled.

    Attributes:
        width: of the head.
        sides: sides R of the images and how often each is drawn; the first is the one of `TOKENS` x `TOKENS` tokens.
        crop: side of a crop in pixels; ``batch`` of them make a step.
        shift, steps: the pipeline's schedule.
    """

    width: float
    sides: dict[int, float]
    crop: int
    batch: int
    shift: float
    steps: int


RECIPES = {
    16: Recipe(0.25, {128: 0.7, 256: 0.1, 512: 0.1, 1024: 0.1}, crop=64, batch=24, shift=6.0, steps=16),
    64: Recipe(0.375, {512: 0.6, 1024: 0.05, 2048: 0.05, 4096: 0.3}, crop=256, batch=4, shift=16.0, steps=24),
}
FOLDERS = {16: "tiny-1k", 64: "tiny-4k"}
GUIDANCE, COARSE_STRENGTH, FULL_GUIDANCE = 1.7, 0.8, 1.0
RATE = 1.5e-3
X0_FLOOR = 0.05
INNER = ("enc2", "enc3", "enc4", "bottleneck", "up4", "dec4", "up3", "dec3", "up2", "dec2", "up1")
ALIKE_WEIGHT = 2.0  # of the error of the level outside them


def inherit(source: ZImageTransformer2DModel, vae: PatchAutoencoder, patch_size: int) -> L2PTransformer2DModel:
    """A pixel model that hands its head what ``source`` makes of the latent; the head is new."""
    config = {key: source.config[key] for key in ("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads",
              "cap_feat_dim", "axes_dims", "axes_lens")}  # fmt: skip
    mean, part = patch_size // READ_PATCH, vae.config.patch
    torch.manual_seed(0)
    model = L2PTransformer2DModel(
        all_patch_size=(patch_size,), rope_grid=TOKENS, x0_floor=X0_FLOOR, read_mean=mean,
        head_width=RECIPES[patch_size].width, **config,
    )  # fmt: skip
    state, given = model.state_dict(), source.state_dict()
    state |= {key: value for key, value in given.items() if key in state and value.shape == state[key].shape}
    # Latent patches are (row, column, channel) of 2 x 2, a pixel patch is (row, column, color).
    weight = given["all_x_embedder.2-1.weight"].unflatten(1, (2, 2, -1))
    weight = torch.einsum("dabk,crsk->darbsc", weight, vae.basis.detach().unflatten(0, (3, part, part)))
    weight = weight.reshape(-1, READ_PATCH, READ_PATCH, 3)
    weight = weight.repeat_interleave(mean, 1).repeat_interleave(mean, 2) / mean**2
    state[f"all_x_embedder.{patch_size}-1.weight"] = weight.flatten(1)
    state[f"all_x_embedder.{patch_size}-1.bias"] = given["all_x_embedder.2-1.bias"]
    with torch.no_grad():
        state["local_decoder.out_conv.weight"] *= 0.1
        state["local_decoder.out_conv.bias"].fill_(0.8)  # paper
    model.load_state_dict(state)
    return model


@torch.no_grad()
def inherit_inner(head: DetailerHead, small: DetailerHead) -> None:
    """Make the inner levels of a patch-64 ``head`` those of the patch-16 ``small``, which may be narrower.

    What they compute of the first channels is the same; channels that ``small`` lacks are new and don't reach them.
    """

    def conv(name: str, of: DetailerHead) -> torch.nn.Conv2d:
        return next(part for part in getattr(of, name) if isinstance(part, torch.nn.Conv2d))

    def copy(name: str, after: str | None = None) -> None:
        """Input channels are one group, or two, the first of which is what the convolution ``after`` gives."""
        new, old = conv(name, head), conv(name, small)
        count = old.weight.shape[0]
        new.weight[:count] = 0
        new.bias[:count] = old.bias
        known, start = (conv(after, of).weight.shape[0] if after else 0 for of in (small, head))
        new.weight[:count, :known] = old.weight[:, :known]
        rest = old.weight.shape[1] - known
        new.weight[:count, start : start + rest] = old.weight[:, known:]

    for name in INNER:
        copy(name, {"bottleneck": "enc4", "dec4": "up4", "dec3": "up3", "dec2": "up2"}.get(name))
    for name in INNER:
        getattr(head, name).requires_grad_(False)


class Sample(NamedTuple):
    """One training example; the window is (row, column, side) in tokens of the small image."""

    text: str
    clean: Tensor  # (3, crop, crop)
    noisy: Tensor
    small: Tensor  # (3, S, S), noisy
    sigma: float
    small_sigma: float
    side: int
    window: tuple[float, float, float]


def draw_sample(recipe: Recipe, patch_size: int, seed: int) -> Sample:
    """A crop, mostly around the edge of a thing, and the small image with the means of its noise."""
    prompt, scene, rng = next(random_pictures(6, patch_size, seed))
    noise = torch.Generator().manual_seed(seed)
    side = int(rng.choice(list(recipe.sides), p=list(recipe.sides.values())))
    crop, gain, base = recipe.crop, side // SIDE, next(iter(recipe.sides))
    thing = scene[rng.integers(len(scene))]
    middle = (
        np.array([thing.y, thing.x]) + rng.uniform(-1.1, 1.1, 2) * thing.size if rng.random() < 0.75 else rng.random(2)
    )
    top, left = (
        np.clip(np.round((middle * side - crop / 2) / patch_size) * patch_size, 0, side - crop).astype(int).tolist()
    )
    clean = torch.from_numpy(draw(scene, side, side, (top, left, crop, crop)))
    small = torch.from_numpy(draw(scene, SIDE, SIDE))
    eps, small_eps = (torch.randn(x.shape, generator=noise) for x in (clean, small))
    if crop % gain == 0:
        row, column, cells = top // gain, left // gain, crop // gain
        small_eps[:, row : row + cells, column : column + cells] = F.avg_pool2d(eps, gain) * gain
    # Images larger than the base are begun coarsely: low noise is seen at their size, and some of the coarse blur. The
    # texture that the coarse image can't hold stays whole. Its phase is not in what is shown if it is taken out, so the
    # best prediction would be none, and in sampling it would never grow out of the noise.
    u, shown = rng.random(), clean
    if side > base:
        sigma, scale = 0.85 * u, side // base
        coarse = draw(scene, base, base, (top // scale, left // scale, crop // scale, crop // scale))
        blurred = F.interpolate(torch.from_numpy(coarse)[None], (crop, crop), mode="bicubic")[0]
        sharp = torch.from_numpy(draw(scene, side, side, (top, left, crop, crop), texture_of=base))
        shown = clean + max(0.0, rng.uniform(-0.5, 1.0)) * (blurred - sharp)
    else:
        shift = recipe.shift
        sigma = shift * u / (1 + (shift - 1) * u) if rng.random() < 0.75 else 0.7 * u
    sigma = max(sigma, 0.01)
    small_sigma = sigma / (gain * (1 - sigma + sigma / gain))  # as `L2PTransformer2DModel` reads it
    return Sample(
        prompt.text if rng.random() < 0.9 else "", clean, flow.add_noise(shown, eps, sigma),
        flow.add_noise(small, small_eps, small_sigma), sigma, small_sigma, side,
        (top / side * TOKENS, left / side * TOKENS, crop / side * TOKENS),
    )  # fmt: skip


def run(folder: Path, device: torch.device, patch_size: int, minutes: float, start: Path | None = None) -> None:
    """Train ``folder/tiny-1k`` or ``folder/tiny-4k``, a pipeline folder in bf16, from ``folder/source``.

    The head begins new, or as that of the pixel model ``start``.
    """
    result, recipe = folder / FOLDERS[patch_size], RECIPES[patch_size]
    if result.exists():
        return
    source = load_source(folder, torch.device("cpu"))
    transformer, vae = source.transformer.float(), PatchAutoencoder.from_pretrained(folder / "vae")
    reader = inherit(transformer, vae, READ_PATCH).to(device).eval()
    model = inherit(transformer, vae, patch_size)
    encoder = source.text_encoder.float().to(device)
    texts: dict[str, Tensor] = {}

    def features(samples: list[Sample]) -> Tensor:
        new = [s.text for s in samples if s.text not in texts]
        texts.update(zip(new, encode_prompts(encoder, source.tokenizer, new), strict=True) if new else [])
        times = 1 - torch.tensor([s.small_sigma for s in samples])
        small = torch.stack([s.small for s in samples])
        with torch.no_grad(), autocast(device):
            found = reader.features(small.to(device), times.to(device), [texts[s.text] for s in samples]).float()
        cut = []
        for sample, part in zip(samples, found, strict=True):
            tokens = sample.side // patch_size
            part = F.interpolate(part[None], (tokens, tokens), mode="bilinear")[0] if tokens > TOKENS else part
            row, column, size = (round(value * tokens / TOKENS) for value in sample.window)
            cut.append(part[:, row : row + size, column : column + size])
        return torch.stack(cut)

    head, teacher, seen = model.head, None, []
    if start is not None:
        given = L2PTransformer2DModel.from_pretrained(start / "transformer", dtype=torch.float32)
        if given.patch_size != patch_size:
            raise UserError(f"--start must be a model of patch {patch_size}, got patch {given.patch_size}")
        head.load_state_dict(given.head.state_dict())
    if patch_size > READ_PATCH:
        begun = folder / FOLDERS[READ_PATCH] / "transformer"
        if not begun.exists():
            raise UserError(f"the patch-{patch_size} head contains the patch-16 one; run bundle --patch-size 16 first")
        teacher = L2PTransformer2DModel.from_pretrained(begun, dtype=torch.float32).head
        inherit_inner(head, teacher)
        teacher = teacher.enc1[0].to(device).requires_grad_(False)
        head.enc1[0].register_forward_hook(lambda _, __, out: seen.append(out))
    head.to(device, memory_format=torch.channels_last)

    def loss_of(step: int) -> Tensor:
        samples = [draw_sample(recipe, patch_size, step * recipe.batch + i) for i in range(recipe.batch)]
        noisy, clean = (torch.stack([s[i] for s in samples]).to(device) for i in (2, 1))
        sigma = torch.tensor([s.sigma for s in samples], device=device)
        error = (head(noisy, features(samples)) - clean).square().mean(dim=(1, 2, 3))
        loss = (error / (sigma.square() + 0.02)).mean()  # nearly the velocity's error, but finite at sigma 0
        if teacher is not None:  # the smaller head sees means, scaled as `read_mean` has it
            scale = patch_size // READ_PATCH
            small = F.avg_pool2d(noisy, scale) / (1 - sigma + sigma / scale).view(-1, 1, 1, 1)
            known = teacher(small)
            loss = loss + ALIKE_WEIGHT * F.mse_loss(seen.pop()[:, : known.shape[1]], known)
        return loss

    work = folder / f"head-{patch_size}"
    work.mkdir(exist_ok=True)
    optimizer = Optimizer(
        head.named_parameters(), RATE, lambda _, p: p.ndim == 4 and p.shape[0] >= 8 and p[0].numel() >= 64
    )
    fit(f"head of patch {patch_size}", head, optimizer, loss_of, folder=work, minutes=minutes, ema_decay=0.99)
    pipeline = L2PPipeline(
        transformer=model.cpu().to(torch.bfloat16), text_encoder=source.text_encoder.cpu().to(torch.bfloat16),
        tokenizer=source.tokenizer, scheduler=make_scheduler(recipe.shift), default_steps=recipe.steps,
        default_guidance_scale=GUIDANCE, coarse_size=TOKENS, coarse_strength=COARSE_STRENGTH,
        full_guidance_scale=FULL_GUIDANCE,
    )  # fmt: skip
    with atomic_path(result) as temporary:
        pipeline.save_pretrained(temporary)
