"""The authors' outputs, which end-to-end agreement is measured against.

Their published code (for 4K, 8K and 10K: its keys and shapes) ran in fp32 at width 64, on weights and inputs drawn from
a seed. What can be drawn again is drawn here. tests/goldens/ holds the rest: every third row and column of the outputs,
which meets every position within a patch, and the text features, which show whether the draws are still the same. There
are outputs for patches 16, 64 and 160, and none for patch 128. tests/goldens/shapes.json lists the published files'
tensors and their shapes.

``L2P_GOLDENS=folder`` takes the whole tensors instead: patchP/config.json, model.safetensors and io.safetensors.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "goldens"
STRIDE = 3  # of the kept rows and columns
CONFIG = {
    "all_f_patch_size": (1,), "in_channels": 3, "dim": 64, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2,
    "n_kv_heads": 2, "cap_feat_dim": 48, "axes_dims": (8, 12, 12), "axes_lens": (256, 64, 64),
}  # fmt: skip
CASES = {16: ((1, 128, 128), (1, 144, 176), (2, 256, 128)), 64: ((1, 512, 512), (1, 320, 448)), 160: ((1, 640, 960),)}
SEED = 12  # plus the patch size


class Golden(NamedTuple):
    """One patch size."""

    config: dict  # constructor arguments
    weights: dict[str, Tensor]  # bf16, to be used in fp32
    io: dict[str, Tensor]  # BxHxW.pixels (B, 3, H, W), .t (B,), .cap0... (L, 48), .raw (B, 3, H, W); sample.*
    stride: int  # of rows and columns in .raw and sample.final


def golden(patch: int) -> Golden:
    """Config, weights, inputs and outputs for ``patch`` (16, 64 or 160)."""
    given = os.environ.get("L2P_GOLDENS")
    if given:
        folder = Path(given) / f"patch{patch}"
        config = json.loads((folder / "config.json").read_text())
        return Golden(config, load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors"), 1)
    from l2p_fast.models.zimage import L2PTransformer2DModel

    config = {"all_patch_size": (patch,), **CONFIG}
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in L2PTransformer2DModel(**config).state_dict().items()}
    generator = torch.Generator().manual_seed(SEED + patch)
    weights = {key: _weight(key, torch.randn(shapes[key], generator=generator)) for key in sorted(shapes)}
    kept = load_file(FOLDER / f"patch{patch}.safetensors")
    io = {}
    for batch, height, width in CASES[patch]:
        case = f"{batch}x{height}x{width}"
        io[f"{case}.pixels"] = torch.randn(batch, 3, height, width, generator=generator)
        io[f"{case}.t"] = torch.rand(batch, generator=generator)
        for i in range(batch):
            io[f"{case}.cap{i}"] = torch.randn(kept[f"{case}.cap{i}"].shape, generator=generator)
    if patch == 16:  # a run of 6 steps with guidance 2
        io["sample.noise"] = torch.randn(1, 3, 128, 128, generator=generator)
        for name in ("sample.pos", "sample.neg"):
            io[name] = torch.randn(kept[name].shape, generator=generator)
    for key in kept.keys() & io.keys():
        torch.testing.assert_close(io[key], kept[key], msg=f"this PyTorch draws other random numbers: {key}")
    return Golden(config, weights, kept | io, STRIDE)


def _weight(key: str, drawn: Tensor) -> Tensor:
    if "pad_token" in key:
        value = 0.5 * drawn
    elif drawn.ndim > 1:
        value = drawn * (1.4 / math.sqrt(drawn[0].numel()))
    elif "norm" in key or key == "cap_embedder.0.weight":
        value = 1 + 0.1 * drawn
    else:
        value = 0.05 * drawn
    return value.bfloat16()


def published_shapes(name: str) -> dict[str, list[int]]:
    """The tensors of a published file, ``name`` 1k, 4k, 8k or 10k, and their shapes."""
    shapes = json.loads((FOLDER / "shapes.json").read_text())
    return shapes["all"] | shapes[name]
