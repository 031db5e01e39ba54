"""L2P transfer in small: the source's blocks move over, patch embedding and Detailer Head are new, pixels are the data.

What is special to the small world is here: the starting weights, the pictures, the settings. The training itself is
`l2p_fast.train`.

As published: everything is trained but the middle blocks, the objective is the source's own. Most pictures are the
source's, on the 8 x 8 tokens that it knows; `rope_grid` maps every other grid onto them. Finer grids only finish what
a coarse start has laid out (`L2PPipeline`), so they see the renderer's pictures, as the paper takes real ones at 4K,
low noise, and the blur of a coarse start.

The patch-64 model is the patch-16 one with another head: a 64-px patch is read as the mean of its 4 x 4 pixel blocks,
and its transformer is fitted to say the same of it (`follow`). So only the head is trained on pictures.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from l2p_fast.errors import UserError
from l2p_fast.files import atomic_path
from l2p_fast.models.blocks import Rope
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.sampling import flow
from l2p_fast.sampling.pipeline import L2PPipeline, make_scheduler
from l2p_fast.training import loop
from l2p_fast.training.config import (
    Config,
    DataConfig,
    EMAConfig,
    FreezeConfig,
    GridConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
)
from l2p_fast.training.data import list_images
from l2p_fast.training.parallel import start

from .corpus import draw_corpus, load_source
from .ldm import autocast

GRID = 8  # tokens of a side that the source was trained on
HEAD_WIDTHS = {16: 0.25, 64: 0.375}  # the 64-px head needs 8 channels at full resolution to let the noise through
FREE_BLOCKS = 2  # first and last layers that are trained; those between stay the source's
# The more pixels in a patch, the longer noise hides the layout: the schedules of sampling and of training.
SHIFTS = {16: 6.0, 64: 16.0}
# (tokens of a side, pictures in a batch, tokens of a side that the head sees or 0: all, share of the steps)
GRIDS = {
    16: ((8, 32, 0, 0.82), (16, 6, 0, 0.06), (32, 2, 0, 0.07), (64, 1, 16, 0.05)),
    64: ((8, 12, 4, 0.78), (8, 3, 0, 0.12), (16, 2, 8, 0.06), (32, 1, 8, 0.03), (64, 1, 8, 0.01)),
}
RATES = {16: 1e-3, 64: 1.5e-3}
FINE_PICTURES = {16: 240, 32: 80, 64: 24}  # the renderer's, by tokens of a side
FOLLOW_STEPS = 1000
COARSE_STRENGTH = 0.8  # noise level at which a coarse start hands over to a finer grid


def initial_model(source: torch.nn.Module, patch_size: int) -> L2PTransformer2DModel:
    """A pixel model with every tensor of ``source`` that fits by name and shape.

    Where ``source`` is a pixel model of a smaller patch, the head is new all the same, and the patch embedding is
    spread over the larger patch's pixels: the new one begins as the old one on the picture made smaller.
    """
    config = {key: source.config[key] for key in ("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads",
              "cap_feat_dim", "axes_dims", "axes_lens")}  # fmt: skip
    torch.manual_seed(0)
    model = L2PTransformer2DModel(
        all_patch_size=(patch_size,), rope_grid=GRID, head_width=HEAD_WIDTHS[patch_size], **config
    )
    state = model.state_dict()
    kept = {k: v for k, v in source.state_dict().items() if k in state and v.shape == state[k].shape}
    state |= {k: v for k, v in kept.items() if not k.startswith("local_decoder.")}
    if isinstance(source, L2PTransformer2DModel):
        small = source.patch_size
        scale = patch_size // small
        old = source.all_x_embedder[f"{small}-1"]
        weight = old.weight.detach().unflatten(1, (small, small, 3))
        weight = weight.repeat_interleave(scale, 1).repeat_interleave(scale, 2) / scale**2
        state[f"all_x_embedder.{patch_size}-1.weight"] = weight.flatten(1)
        state[f"all_x_embedder.{patch_size}-1.bias"] = old.bias.detach()
    model.load_state_dict(state)
    return model


def follow(
    coarser: L2PTransformer2DModel, scale: int, pictures: Tensor, shift: float, steps: int
) -> L2PTransformer2DModel:
    """A copy of ``coarser`` that says of means over ``scale`` x ``scale`` pixels what ``coarser`` says of pixels.

    The mean leaves the picture and divides the noise by ``scale``: a noisy picture of level s becomes k times one of
    level s' = s / (scale k), with k = 1 - s + s / scale. Embeddings and noise refiner are fitted to give at (k x, s)
    what they gave at (x, s'); all that comes after is the same.

    Args:
        pictures: (N, 3, 256, 256) uint8.
        shift: of the noise levels s.
    """
    copy = deepcopy(coarser).requires_grad_(False)
    parts = ("all_x_embedder.", "t_embedder.", "noise_refiner.")
    fitted = [p for name, p in copy.named_parameters() if name.startswith(parts)]
    for p in fitted:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(fitted, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    device, rng = pictures.device, torch.Generator().manual_seed(0)
    text = [torch.zeros(1, coarser.config.cap_feat_dim, device=device)]

    def front(model: L2PTransformer2DModel, x: Tensor, t: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        temb, out = model.embed_time(t), model.embed_image(x)
        for block in model.noise_refiner:
            out = block(out, rope, temb=temb)
        return temb, out

    for step in tqdm(range(steps), desc="follow", disable=not sys.stderr.isatty()):
        tokens, batch = (2 * GRID, 6) if step % 4 == 0 else (GRID, 24)
        side = tokens * coarser.patch_size
        x0 = pictures[torch.randint(len(pictures), (batch,), generator=rng)].float() / 127.5 - 1
        x0 = F.interpolate(x0, (side, side), mode="area")
        s = torch.rand(batch, generator=rng).to(device)
        s = shift * s / (1 + (shift - 1) * s) if tokens == GRID else COARSE_STRENGTH * s
        k = 1 - s + s / scale
        small = s / (scale * k)
        x = flow.add_noise(x0, torch.randn(x0.shape, generator=rng).to(device), small)
        rope = coarser.prepare(text, side, side).rope_image
        with torch.no_grad():
            wanted = front(coarser, x, 1 - small, rope)
        with autocast(device):
            found = front(copy, k.view(-1, 1, 1, 1) * x, 1 - s, rope)
        sum(F.mse_loss(f.float(), w) / w.var() for f, w in zip(found, wanted, strict=True)).backward()
        torch.nn.utils.clip_grad_norm_(fitted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
    return copy


def settings(folder: Path, patch_size: int, minutes: float) -> Config:
    """The run of ``folder/transfer-<patch size>``, for `l2p_fast.train`."""

    def grid(tokens: int, batch: int, crop: int, share: float) -> GridConfig:
        known = GridConfig(tokens=tokens**2, batch=batch, share=share, head_crop=crop)
        if tokens == GRID:
            return known
        fine = {"path": str(folder / "renderer" / str(tokens * patch_size)), "coarse": GRID}
        return replace(known, **fine, sigma_max=COARSE_STRENGTH, shift=1.0)

    return Config(
        run=str(folder / f"transfer-{patch_size}"), steps=1_000_000, minutes=minutes, save_every=200,
        model=ModelConfig(base=str(folder / f"init-{patch_size}"), weights="float32"),
        freeze=FreezeConfig("published" if patch_size == min(HEAD_WIDTHS) else ["local_decoder.*"], FREE_BLOCKS),
        objective=ObjectiveConfig(sigma="continuous", shift=SHIFTS[patch_size], noise="fresh", pyramid=0.25),
        data=DataConfig(
            path=str(folder / "corpus"), grids=[grid(*values) for values in GRIDS[patch_size]], caption_dropout=0.1,
            features=str(folder / "features"), text_encoder=str(folder / "source"), workers=1,
        ),
        optim=OptimConfig(
            kind="adamw", lr=RATES[patch_size], betas=[0.9, 0.95], schedule="cosine", warmup=100, clip=1.0
        ),
        ema=EMAConfig(decay=0.999), memory=MemoryConfig(checkpointing=False, head_mb=1000), log=LogConfig(board="none"),
    )  # fmt: skip


def prepare(folder: Path, patch_size: int, device: torch.device) -> None:
    """What `settings` names: starting weights, and the renderer's pictures for the finer grids."""
    base, corpus = folder / f"init-{patch_size}", folder / "corpus"
    if patch_size > min(HEAD_WIDTHS) and not (folder / "l2p-16").exists():
        raise UserError("the patch-64 model starts from the patch-16 one; run transfer --patch-size 16 first")
    if not (corpus / "metadata.csv").exists():
        raise UserError(
            f"no pictures in {corpus}; let the source draw them first: python -m examples.tiny corpus --folder {folder}"
        )
    if not base.exists():
        if patch_size == min(HEAD_WIDTHS):
            source = load_source(folder, device).transformer.float()
        else:
            coarser = L2PTransformer2DModel.from_pretrained(folder / "l2p-16" / "transformer", dtype=torch.float32)
            pictures = [np.asarray(Image.open(picture.file)) for picture in list_images(DataConfig(str(corpus)))]
            stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(device)
            source = follow(coarser.to(device), patch_size // 16, stack, SHIFTS[patch_size], FOLLOW_STEPS).cpu()
        with atomic_path(base) as temporary:
            initial_model(source, patch_size).save_pretrained(temporary)
    for tokens in {tokens for tokens, *_ in GRIDS[patch_size]} - {GRID}:
        side = tokens * patch_size
        draw_corpus(folder / "renderer" / str(side), side, FINE_PICTURES[tokens])


def run(folder: Path, device: torch.device, patch_size: int, minutes: float) -> None:
    """Train ``folder/l2p-<patch size>``, a pipeline folder in bf16. Patch 64 starts from the model of patch 16."""
    result = folder / f"l2p-{patch_size}"
    if result.exists():
        return
    prepare(folder, patch_size, device)
    config = settings(folder, patch_size, minutes)
    config.device = str(device)
    workers = start(config)
    try:
        finished = loop.train(config, workers)
    finally:
        workers.close()
    if finished:
        save_pipeline(folder, config, result)


def save_pipeline(folder: Path, config: Config, result: Path) -> None:
    """Write the averaged weights of a finished run, with the source's text encoder, as a pipeline folder."""
    model = L2PTransformer2DModel.from_pretrained(config.model.base, dtype=torch.float32)
    model.load_state_dict(model.state_dict() | load_file(Path(config.run) / "trained-ema.safetensors"))
    source = load_source(folder, torch.device("cpu"))
    pipeline = L2PPipeline(
        transformer=model.to(torch.bfloat16), text_encoder=source.text_encoder.to(torch.bfloat16),
        tokenizer=source.tokenizer, scheduler=make_scheduler(config.objective.shift), default_steps=16,
        default_guidance_scale=2.0, coarse_size=GRID, coarse_strength=COARSE_STRENGTH,
    )  # fmt: skip
    with atomic_path(result) as temporary:
        pipeline.save_pretrained(temporary)
