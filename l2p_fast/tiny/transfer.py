"""L2P transfer in small: the source's blocks move over, patch embedding and Detailer Head are new, pixels are the data.

As published: everything is trained but the middle blocks, the objective is the source's own. Most pictures are the
source's, on the 8 x 8 tokens that it knows; `rope_grid` maps every other grid onto them. Finer grids only finish what
a coarse start has laid out (`L2PPipeline`), so they see the renderer's pictures, as the paper takes real ones at 4K,
low noise, and the blur of a coarse start. On crops the head costs least;
on the finest grids only the head is trained.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .. import flow
from ..errors import UserError
from ..files import atomic_path
from ..model import L2PTransformer2DModel
from ..pipeline import L2PPipeline, make_scheduler
from ..text import encode_prompts
from .corpus import load_source
from .fit import Optimizer, fit
from .ldm import autocast, random_pictures
from .world import draw

GRID = 8  # tokens of a side that the source was trained on
HEAD_WIDTHS = {16: 0.25, 64: 0.375}  # the 64-px head needs 8 channels at full resolution to let the noise through
FREE_BLOCKS = 2  # first and last layers that are trained; those between stay the source's
# The more pixels in a patch, the longer noise hides the layout: the schedules of sampling and of training.
SHIFTS = {16: 6.0, 64: 16.0}
# (tokens of a side, pictures in a batch, crops that the head sees or 0: whole pictures, share of the steps)
GRIDS = {
    16: ((8, 32, 0, 0.82), (16, 6, 0, 0.06), (32, 2, 0, 0.07), (64, 1, 4, 0.05)),
    64: ((8, 12, 12, 0.70), (8, 3, 0, 0.12), (16, 1, 0, 0.08), (32, 1, 2, 0.05), (64, 1, 2, 0.05)),
}
RATES = {16: 1e-3, 64: 1.5e-3}
COARSE_STRENGTH = 0.8  # noise level at which a coarse start hands over to a finer grid


def initial_model(
    source: torch.nn.Module, patch_size: int, coarser: L2PTransformer2DModel | None
) -> L2PTransformer2DModel:
    """A pixel model with every tensor of ``source`` that fits by name and shape, then those of ``coarser``.

    ``coarser`` is a model of a smaller patch: its patch embedding is spread over the larger patch's pixels, so that the
    new one begins as the old one on the picture made smaller.
    """
    config = {key: source.config[key] for key in ("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads",
              "cap_feat_dim", "axes_dims", "axes_lens")}  # fmt: skip
    torch.manual_seed(0)
    model = L2PTransformer2DModel(
        all_patch_size=(patch_size,), rope_grid=GRID, head_width=HEAD_WIDTHS[patch_size], **config
    )
    state = model.state_dict()
    for donor in filter(None, (source, coarser)):
        state.update({k: v for k, v in donor.state_dict().items() if k in state and v.shape == state[k].shape})
    if coarser is not None:
        small = coarser.patch_size
        scale = patch_size // small
        old = coarser.all_x_embedder[f"{small}-1"]
        weight = old.weight.detach().unflatten(1, (small, small, 3))
        weight = weight.repeat_interleave(scale, 1).repeat_interleave(scale, 2) / scale**2
        state[f"all_x_embedder.{patch_size}-1.weight"] = weight.flatten(1)
        state[f"all_x_embedder.{patch_size}-1.bias"] = old.bias.detach()
    model.load_state_dict(state)
    last = FREE_BLOCKS, len(model.layers) - FREE_BLOCKS
    for block in model.layers[slice(*last)]:
        block.requires_grad_(False)
    return model


def coarse_error(x0: Tensor, patch_size: int) -> Tensor:
    """What a coarse start gets wrong at best: ``x0`` (B, 3, H, W) shrunk to `GRID` tokens and enlarged, less ``x0``."""
    small = F.interpolate(x0, [GRID * patch_size] * 2, mode="area")
    return F.interpolate(small, x0.shape[-2:], mode="bicubic") - x0


def run(folder: Path, device: torch.device, patch_size: int, minutes: float) -> None:
    """Train ``folder/l2p-<patch size>``, a pipeline folder in bf16. Patch 64 starts from the model of patch 16."""
    result = folder / f"l2p-{patch_size}"
    if result.exists():
        return
    coarser = None
    if patch_size > min(HEAD_WIDTHS):
        if not (folder / "l2p-16").exists():
            raise UserError("the patch-64 model starts from the patch-16 one; run transfer --patch-size 16 first")
        coarser = L2PTransformer2DModel.from_pretrained(folder / "l2p-16" / "transformer", torch_dtype=torch.float32)
    source = load_source(folder, device)
    table = folder / "corpus" / "metadata.csv"
    if not table.exists():
        raise UserError(f"no {table}; let the source draw it first: python -m l2p_fast.tiny corpus --folder {folder}")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    corpus = np.stack([np.asarray(Image.open(folder / "corpus" / row["image"])) for row in rows])
    features = dict.fromkeys(["", *(row["prompt"] for row in rows)])
    encoder = source.text_encoder.float()
    features = dict(zip(features, encode_prompts(encoder, source.tokenizer, list(features)), strict=True))
    model = initial_model(source.transformer.float(), patch_size, coarser).to(device)

    order = torch.Generator()
    grids = GRIDS[patch_size]
    shares = torch.tensor([share for *_, share in grids])

    def from_corpus(side: int) -> tuple[Tensor, str]:
        index = int(torch.randint(len(rows), (), generator=order))
        picture = Image.fromarray(corpus[index])
        if side != picture.width:
            picture = picture.resize((side, side), Image.BOX if side < picture.width else Image.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1, rows[index]["prompt"]

    def from_renderer(side: int, scenes) -> tuple[Tensor, str]:
        prompt, scene, _ = next(scenes)
        return torch.from_numpy(draw(scene, side, side)), prompt.text

    def loss_of(step: int) -> Tensor:
        order.manual_seed(step)  # not only at the start: a resumed run must not see the same again
        tokens, batch, crops, _ = grids[int(torch.multinomial(shares, 1, generator=order))]
        side = tokens * patch_size
        known, scenes = tokens == GRID, random_pictures(4, step)
        pictures = [from_corpus(side) if known else from_renderer(side, scenes) for _ in range(batch)]
        x0 = torch.stack([picture for picture, _ in pictures]).to(device)
        texts = ["" if torch.rand((), generator=order) < 0.1 else text for _, text in pictures]
        for text in set(texts) - features.keys():
            features[text] = encode_prompts(encoder, source.tokenizer, [text])[0]
        uniform = torch.rand(batch, generator=order).to(device)
        noise = torch.randn(x0.shape, generator=order).to(device)
        if tokens == GRID:
            sigma = SHIFTS[patch_size] * uniform / (1 + (SHIFTS[patch_size] - 1) * uniform)
        else:
            # A run that goes on from the coarse picture c at sigma s is a flow with noise + (1 - s) / s (c - x0).
            sigma = COARSE_STRENGTH * uniform
            blur = (1 / COARSE_STRENGTH - 1) * 2 * torch.rand(batch, 1, 1, 1, generator=order).to(device)
            noise += blur * coarse_error(x0, patch_size)
        with autocast(device):
            x, target, caps = flow.add_noise(x0, noise, sigma), flow.target(x0, noise), [features[t] for t in texts]
            if not crops:
                raw = model(x, 1 - sigma, caps)
            else:
                with torch.set_grad_enabled(tokens == GRID):
                    tokens_out = model.features(x, 1 - sigma, caps)
                part = min(GRID, tokens // 2)
                corners = torch.randint(tokens - part + 1, (crops, 2), generator=order).tolist()
                x, target, tokens_out = (
                    torch.cat(
                        [
                            v[i % batch, None, :, u * r : u * (r + part), u * c : u * (c + part)]
                            for i, (r, c) in enumerate(corners)
                        ]
                    )
                    for v, u in ((x, patch_size), (target, patch_size), (tokens_out, 1))
                )
                raw = model.local_decoder(x, tokens_out)
        return F.mse_loss(raw.float(), target)

    def matrices(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and ("layers." in name or "refiner." in name) and "adaLN" not in name

    optimizer = Optimizer(model.named_parameters(), RATES[patch_size], matrices)
    (folder / f"transfer-{patch_size}").mkdir(exist_ok=True)
    fit(f"L2P patch {patch_size}", model, optimizer, loss_of, folder=folder / f"transfer-{patch_size}", minutes=minutes)
    pipeline = L2PPipeline(
        transformer=model.to("cpu", torch.bfloat16), text_encoder=source.text_encoder.to("cpu", torch.bfloat16),
        tokenizer=source.tokenizer, scheduler=make_scheduler(SHIFTS[patch_size]), default_steps=16,
        default_guidance_scale=2.0, coarse_size=GRID, coarse_strength=COARSE_STRENGTH,
    )  # fmt: skip
    with atomic_path(result) as temporary:
        pipeline.save_pretrained(temporary)
