"""The four published shapes of L2P and the source models, and all that is known of each. No such number is elsewhere.

A variant is told by its patch size: every checkpoint of that patch, the small bundled models included, has its head's
levels and its size multiple. Imports no torch, so a command can check a size before anything heavy is loaded.

Source: arXiv 2605.12013, its authors' code and the published checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

NATIVE_TOKENS = 64  # a side of the token grid at every variant's native size
SHIFT = 3.0  # of the noise schedule
BOTTLENECK = 512  # channels inside the Detailer Head


def scaled_channels(channels: int, width: float) -> int:
    """``channels`` of a head whose channels are multiplied by ``width``: a multiple of 4; the 3-channel ends stay."""
    return channels if channels == 3 else max(4, 4 * round(channels * width / 4))


class Level(NamedTuple):
    """One resolution of the Detailer Head: its name and the output channels of ``enc``, ``up`` and ``dec``."""

    name: str
    enc: int
    up: int
    dec: int

    def scaled(self, width: float) -> Level:
        """The level of a head whose channels are multiplied by ``width``."""
        return Level(self.name, *(scaled_channels(channels, width) for channels in self[1:]))


@dataclass(frozen=True)
class Variant:
    """A published shape.

    Attributes:
        name: "1k", "4k", "8k" or "10k".
        patch_size: side of a patch in pixels.
        levels: the Detailer Head's, from full resolution inwards.
        steps, guidance_scale, shift: of sampling, as the authors recommend.
        source: hub id of the latent model it is made from.
    """

    name: str
    patch_size: int
    levels: tuple[Level, ...]
    steps: int
    guidance_scale: float
    source: str
    shift: float = SHIFT

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of, in pixels: the patch, and a whole number of pooled pixels."""
        return math.lcm(self.patch_size, 2 ** len(self.levels))

    @property
    def native_size(self) -> int:
        """Side of an image in pixels that the variant was trained for."""
        return NATIVE_TOKENS * self.patch_size


_INNER = (Level("1", 64, 64, 32), Level("2", 128, 128, 64), Level("3", 256, 256, 128), Level("4", 512, 512, 256))
_4K = (Level("0", 16, 16, 16), Level("0b", 32, 32, 16), *_INNER)
_TURBO, _BASE = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("1k", 16, (Level("1", 64, 64, 64), *_INNER[1:]), 30, 2.0, _TURBO),
        Variant("4k", 64, _4K, 50, 4.0, _BASE),
        Variant("8k", 128, (Level("_8k", 3, 16, 16), *_4K), 50, 4.0, _BASE),
        Variant("10k", 160, (Level("_10k_a", 3, 16, 16), *_4K[:-1]), 50, 4.0, _BASE),
    )
}
OF_PATCH: dict[int, Variant] = {variant.patch_size: variant for variant in VARIANTS.values()}


@dataclass(frozen=True)
class Source:
    """A family of latent models that pixel models are made from.

    Attributes:
        name: of its module in `models/`.
        class_name: of its pixel model there.
        title: as it is written.
        hub: id of the model that convert's examples name.
        text_tokens: of a prompt that are read at the most.
        steps, guidance_scale: of sampling; None: the variant's.
    """

    name: str
    class_name: str
    title: str
    hub: str
    text_tokens: int = 512
    steps: int | None = None
    guidance_scale: float | None = None


# Sources that are distilled for few steps or for guidance keep neither through plain training, so steps are the
# variant's. FLUX.1 [dev] is told its guidance by an embedding, so there is none beside it.
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("zimage", "L2PTransformer2DModel", "Z-Image", _TURBO),
        Source("flux", "L2PFluxTransformer2DModel", "FLUX.1", "black-forest-labs/FLUX.1-dev", guidance_scale=1.0),
        Source("flux2", "L2PFlux2Transformer2DModel", "FLUX.2 [klein]", "black-forest-labs/FLUX.2-klein-4B"),
        Source("qwen_image", "L2PQwenImageTransformer2DModel", "Qwen-Image", "Qwen/Qwen-Image", 1024,
               guidance_scale=4.0),
        Source("sd3", "L2PSD3Transformer2DModel", "Stable Diffusion 3.5", "stabilityai/stable-diffusion-3.5-medium",
               256, guidance_scale=4.5),
    )
}  # fmt: skip


def nearest_sizes(size: int, multiple: int) -> str:
    """The valid sizes next to ``size``, nearest first, as words for an error message: "1024 or 960"."""
    low = size // multiple * multiple
    valid = [value for value in (low, low + multiple) if value > 0]
    return " or ".join(str(value) for value in sorted(valid, key=lambda value: abs(value - size)))
