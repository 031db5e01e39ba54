"""A model of the Detailer Head on a GPU: what it launches, how long that takes, what it holds. No GPU is needed.

``python -m benchmarks.head_model`` prints it for the published heads at their own sizes on an H100. A test compares
launches, bytes and the peak with those of a run that is traced op by op on the meta device.

A launch takes the longer of its memory's time and its tensor cores', and a gap. What tensor cores do is counted as
they do it: a product sums 16 channels, used or not, and a level's own kernel makes whole tiles. Left out: the L2 cache,
which helps several blocks that read the same window; what the library's convolutions launch beside themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from l2p_fast.variants import BOTTLENECK, VARIANTS, Level

SIZE = 2  # bytes of a number on the way, bfloat16
PIXEL_SIZE = 4  # of the state's
TILE = 16, 32  # of a level's own kernel, in csrc/head_cuda.cu
SHARED = 96 * 1024
WINDOW, NARROW_WINDOW = 18 * 68 * 16, 18 * 18 * 16


@dataclass(frozen=True)
class Gpu:
    """What a GPU does a second, of what its maker says what kernels reach."""

    name: str
    bandwidth: float  # bytes
    library: float  # operations of the library's convolutions and products
    own: float  # of kernels by mma instructions
    gap: float  # seconds between two launches


H100 = Gpu("H100", bandwidth=2.9e12, library=0.5 * 990e12, own=0.35 * 990e12, gap=2e-6)


@dataclass(frozen=True)
class Launch:
    """One kernel: operations that tensor cores do, bytes read and written, bytes held at once while it runs.

    What is held leaves out the state, the features, the weights and the result.
    """

    name: str
    flops: int
    bytes: int
    held: int
    own: bool = False  # by mma instructions

    def seconds(self, gpu: Gpu) -> float:
        return max(self.flops / (gpu.own if self.own else gpu.library), self.bytes / gpu.bandwidth) + gpu.gap


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def evened(channels: int) -> int:
    """Channels that a level of its own kernel stores: an odd one more."""
    return channels + channels % 2


def groups(channels: int, inputs: int, coarse: int, image: bool) -> tuple[int, int]:
    """How many blocks share a tile, each of which reads its windows, and how many outputs each makes."""
    narrow = inputs <= 4
    chunks, coarse_chunks = 1 if narrow else -(-inputs // 16), -(-coarse // 16)
    window = NARROW_WINDOW if narrow and not coarse else 10 * 36 * 16 if narrow else WINDOW

    def shared(blocks: int) -> int:
        fine = up((6 if narrow else 9) * blocks, 2)
        return 256 * (chunks * fine + coarse_chunks * 36 * blocks) + 2 * window

    blocks = -(-channels // 8)
    two = blocks > 1 and (image or shared(2) <= SHARED or shared(1) > SHARED)
    return -(-blocks // (2 if two else 1)), 16 if two else 8


def level_flops(height: int, width: int, inputs: int, coarse: int, channels: int, image: bool) -> int:
    count, outputs = groups(channels, inputs, coarse, image)
    pixels = up(height, TILE[0]) * up(width, TILE[1])
    fine = 3 * 16 if inputs <= 4 else 9 * up(inputs, 16)
    return 2 * pixels * count * outputs * (fine + 9 * up(coarse, 16)) + (2 * pixels * 16 * 8 if image else 0)


def launches(
    levels: Sequence[Level], outer: int, dim: int, tokens: tuple[int, int], height: int, width: int
) -> Iterator[Launch]:
    """A forward pass over one image whose features are (dim, *tokens): ``outer`` levels by kernels of their own."""
    areas = [(height >> k) * (width >> k) for k in range(len(levels) + 1)]
    skips, held, channels = [], 0, 3
    pooled = 0  # bytes of the map that goes inwards
    for k, level in enumerate(levels):
        enc = evened(level.enc) if k < outer else level.enc
        skip, half, read = SIZE * areas[k] * enc, SIZE * areas[k + 1] * enc, areas[k] * channels * SIZE
        if k == 0:
            read = areas[0] * channels * PIXEL_SIZE
        if k < outer:
            count, _ = groups(enc, channels, 0, False)
            flops = level_flops(height >> k, width >> k, channels, 0, enc, False)
            yield Launch(f"enc{level.name}", flops, count * read + skip + half, held + pooled + skip + half, True)
        else:
            yield Launch(f"enc{level.name}", 18 * areas[k] * channels * enc, read + skip, held + pooled + skip)
            yield Launch(f"enc{level.name} activate", 0, 2 * skip + half, held + pooled + 2 * skip + half)
        skips.append(skip)
        held, pooled, channels = held + skip, half, enc
    inside, bottleneck = areas[-1], SIZE * areas[-1] * BOTTLENECK
    area = tokens[0] * tokens[1]
    mapped = SIZE * area * BOTTLENECK
    yield Launch("features", 2 * area * dim * BOTTLENECK, SIZE * area * dim + mapped, held + pooled + mapped)
    if area != inside:
        yield Launch("resize", 0, mapped + bottleneck, held + pooled + mapped + bottleneck)
    yield Launch("bottleneck", 2 * inside * channels * BOTTLENECK, pooled + bottleneck, held + pooled + 2 * bottleneck)
    yield Launch("bottleneck activate", 0, 3 * bottleneck, held + pooled + 3 * bottleneck)
    x, channels = bottleneck, BOTTLENECK
    for k in reversed(range(len(levels))):
        level = levels[k]
        out, skip = SIZE * areas[k] * level.dec, skips.pop()
        if k < outer:
            enc = evened(level.enc)
            count, _ = groups(level.dec, enc, channels, k == 0)
            flops = level_flops(height >> k, width >> k, enc, channels, level.dec, k == 0)
            result = SIZE * areas[0] * 3 if k == 0 else out
            stored = k > 0 or level.dec > 16
            yield Launch(
                f"dec{level.name}",
                flops,
                count * (x + skip) + (out if stored else result),
                held + x + stored * out,
                True,
            )
            if k == 0 and stored:
                yield Launch("image", 0, out + result, held + x + out)
        else:
            wide = SIZE * areas[k] * level.up
            yield Launch(f"up{level.name}", 8 * areas[k] * channels * level.up, x + wide, held + x + wide)
            yield Launch(
                f"dec{level.name} of up", 18 * areas[k] * level.up * level.dec, wide + out, held + x + wide + out
            )
            yield Launch(
                f"dec{level.name} of skip", 18 * areas[k] * level.enc * level.dec, skip + out, held + x + 2 * out
            )
            yield Launch(f"dec{level.name} activate", 0, 3 * out, held + x + 3 * out)
        held, x, channels = held - skip, out, level.dec


def summary(variant: str, gpu: Gpu = H100) -> str:
    """One line on a published head at its own size."""
    v = VARIANTS[variant]
    outer = sum(level.enc <= 64 for level in v.levels)
    side = v.native_size
    made = list(launches(v.levels, outer, 3840, (64, 64), side, side))
    seconds, held = sum(launch.seconds(gpu) for launch in made), max(launch.held for launch in made)
    return (
        f"{variant:>4}  {side:>5} px  {len(made):>2} launches  {1e3 * seconds:5.2f} ms on an {gpu.name}  "
        f"{held / 1e9:.2f} GB beside state and result"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_model", description=__doc__.split("\n")[0])
    parser.add_argument("--launches", choices=VARIANTS, help="every launch of one head")
    given = parser.parse_args()
    if given.launches:
        v = VARIANTS[given.launches]
        outer = sum(level.enc <= 64 for level in v.levels)
        for launch in launches(v.levels, outer, 3840, (64, 64), v.native_size, v.native_size):
            print(
                f"{launch.name:<22} {launch.flops / 1e9:7.1f} GFLOP {launch.bytes / 1e6:7.0f} MB "
                f"{1e6 * launch.seconds(H100):6.0f} us  holds {launch.held / 1e6:6.0f} MB"
            )
    for variant in VARIANTS:
        print(summary(variant))


if __name__ == "__main__":
    main()
