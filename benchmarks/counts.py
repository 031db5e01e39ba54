"""Operations and bytes of the things that are measured, counted from their shapes alone.

Operations are those of the plain function, a multiply-add as two: a version that saves some of them may exceed the
share of the peak that they suggest. Bytes are the least that must move: weights and inputs read once, results written
once; nothing that a version keeps in between. Convolutions, matrix products and attention count as operations; norms,
activations and softmax only as bytes where they are measured alone.

Letters: N tokens, D model width, H x W pixels, P patch, L text tokens. ``size`` is bytes of a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TIME_WIDTH = 256  # of the sinusoid and, at most, of the timestep embedding
TIME_HIDDEN = 1024
SEQUENCE_MULTIPLE = 32


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must be read or written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.bytes * times)


def moved(*shapes: Iterable[int], size: int = 2) -> Work:
    """Tensors of these shapes, each read or written once."""
    return Work(0, size * sum(_product(shape) for shape in shapes))


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def conv(pixels: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    return 2 * pixels * inputs * outputs * kernel * kernel


def attention(tokens: int, width: int) -> int:
    """Scores and weighted sum of full attention; ``width`` is all heads' together."""
    return 4 * tokens * tokens * width


def padded(tokens: int) -> int:
    return -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE


# --- The transformer -------------------------------------------------------------------------------------------------
def block_flops(tokens: int, dim: int, modulated: bool = True) -> int:
    """One transformer block: four projections, attention, the gated feed-forward, adaLN."""
    hidden = int(dim / 3 * 8)
    flops = 4 * linear(tokens, dim, dim) + attention(tokens, dim) + 3 * linear(tokens, dim, hidden)
    return flops + (linear(1, min(dim, TIME_WIDTH), 4 * dim) if modulated else 0)


def block_weights(dim: int, modulated: bool = True) -> int:
    """Values in one block, the norms' left out."""
    hidden = int(dim / 3 * 8)
    return 4 * dim * dim + 3 * dim * hidden + (4 * dim * (min(dim, TIME_WIDTH) + 1) if modulated else 0)


def block(tokens: int, dim: int, size: int = 2) -> Work:
    """One modulated block alone."""
    return Work(block_flops(tokens, dim), size * (block_weights(dim) + 2 * tokens * dim))


def body(
    image_tokens: int, text_tokens: int, dim: int, layers: int, refiners: int, patch_width: int, cap_dim: int, size=2
) -> Work:
    """One pass of the transformer: embeddings, both refiners, the joint blocks; ``patch_width`` values a patch."""
    n, text = padded(image_tokens), padded(text_tokens)
    time = min(dim, TIME_WIDTH)
    flops = linear(image_tokens, patch_width, dim) + linear(text_tokens, cap_dim, dim)
    flops += linear(1, TIME_WIDTH, TIME_HIDDEN) + linear(1, TIME_HIDDEN, time)
    flops += refiners * (block_flops(n, dim) + block_flops(text, dim, modulated=False))
    flops += layers * block_flops(n + text, dim)
    weights = (patch_width + cap_dim) * dim + TIME_HIDDEN * (TIME_WIDTH + time)
    weights += (refiners + layers) * block_weights(dim) + refiners * block_weights(dim, modulated=False)
    return Work(flops, size * (weights + image_tokens * patch_width + text_tokens * cap_dim + n * dim))


def latent_step(tokens: int, text_tokens: int, dim: int, layers: int, refiners: int, cap_dim: int, size=2) -> Work:
    """One pass of Z-Image on 16-channel latents in patches of 2: the body and its final layer."""
    width = 2 * 2 * 16
    final = linear(padded(tokens), dim, width) + linear(1, min(dim, TIME_WIDTH), dim)
    out = Work(final, size * (width * dim + tokens * width))
    return body(tokens, text_tokens, dim, layers, refiners, width, cap_dim, size) + out


# --- The Detailer Head -----------------------------------------------------------------------------------------------
def head(
    levels: Sequence, bottleneck: int, dim: int, height: int, width: int, patch: int, size: int = 2, state_size: int = 4
) -> Work:
    """The head at H x W; ``levels`` (name, enc, up, dec) from full resolution inwards as in `DetailerHead.levels`."""
    flops, weights, channels, area = 0, 0, 3, height * width
    for _, enc, _, _ in levels:
        flops += conv(area, channels, enc)
        weights += 9 * channels * enc
        channels, area = enc, area // 4
    flops += conv(area, channels + dim, bottleneck, kernel=1)
    weights += (channels + dim) * bottleneck
    channels = bottleneck
    for _, enc, up, dec in reversed(levels):
        area *= 4
        flops += conv(area, channels, up) + conv(area, up + enc, dec)
        weights += 9 * (channels * up + (up + enc) * dec)
        channels = dec
    flops += conv(area, channels, 3, kernel=1)
    features = (height // patch) * (width // patch) * dim
    return Work(flops, size * (weights + 3 * channels + features + 3 * area) + state_size * 3 * area)


# --- The autoencoder's decoder ---------------------------------------------------------------------------------------
def vae_decode(channels: Sequence[int], latent_channels: int, height: int, width: int, layers=2, size=2) -> Work:
    """`AutoencoderKL` from latents of height x width to 2 to (levels - 1) times that; ``channels`` as in its config."""
    area, inner = height * width, channels[-1]
    flops, weights = conv(area, latent_channels, inner), 9 * latent_channels * inner

    def resnet(inputs: int, outputs: int) -> None:
        nonlocal flops, weights
        flops += conv(area, inputs, outputs) + conv(area, outputs, outputs)
        weights += 9 * (inputs + outputs) * outputs
        if inputs != outputs:
            flops += conv(area, inputs, outputs, kernel=1)
            weights += inputs * outputs

    resnet(inner, inner)
    flops += 4 * linear(area, inner, inner) + attention(area, inner)
    weights += 4 * inner * inner
    resnet(inner, inner)
    previous = inner
    for i, out in enumerate(reversed(channels)):
        for _ in range(layers + 1):
            resnet(previous, out)
            previous = out
        if i < len(channels) - 1:
            area *= 4
            flops += conv(area, out, out)
            weights += 9 * out * out
    flops += conv(area, previous, 3)
    weights += 9 * previous * 3
    return Work(flops, size * (weights + latent_channels * height * width + 3 * area))


# --- Training --------------------------------------------------------------------------------------------------------
def training(forward: Work, frozen_weight_flops: int, trained_weights: int, optimizer_bytes: int) -> Work:
    """A step of ``forward``'s model: forward once, backward as two more, but no weight gradient where frozen.

    What activation checkpointing computes again is not counted. ``optimizer_bytes`` move for every trained value.
    """
    return Work(3 * forward.flops - frozen_weight_flops, 3 * forward.bytes + trained_weights * optimizer_bytes)


def _product(shape: Iterable[int]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
