"""Random shapes, strides, offsets and dtypes through every op, against the references: run by ``__main__.py``.

A failure prints the seed of its case, which alone repeats it: ``... fuzz KIND 0 SEED``.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from l2p_fast import ops
from l2p_fast.ops import head

from . import plugin  # noqa: F401  puts the library in place of the extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 3e-2}


def tensor(dice: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, in memory at random: dense, at an offset, cut out, permuted, with padded rows, expanded."""
    kind = dice.choice(("dense", "offset", "cut", "permuted", "padded", "expanded"))
    if kind == "offset":
        offset = dice.randrange(1, 9)
        return torch.randn(math.prod(shape) + offset).to(dtype)[offset:].view(shape)
    if kind == "cut":
        whole = [size + dice.randrange(3) for size in shape]
        x = torch.randn(whole).to(dtype)
        for dim, (size, all_of_it) in enumerate(zip(shape, whole, strict=True)):
            x = x.narrow(dim, dice.randrange(all_of_it - size + 1), size)
        return x
    if kind == "permuted":
        order = dice.sample(range(len(shape)), len(shape))
        return (
            torch.randn([shape[dim] for dim in order])
            .to(dtype)
            .permute([order.index(dim) for dim in range(len(shape))])
        )
    if kind == "padded":
        return torch.randn(*shape[:-1], shape[-1] + dice.choice((4, 8, 16))).to(dtype)[..., : shape[-1]]
    if kind == "expanded":
        dim = dice.randrange(len(shape))
        return torch.randn([1 if i == dim else size for i, size in enumerate(shape)]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


def near(got: Tensor, wanted: Tensor, tolerance: float, what: object) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, what
    if got.numel() > 0:
        error = ((got.double() - wanted.double()).norm() / (wanted.double().norm() + 1e-9)).item()
        assert error <= tolerance, f"{what}: error {error:.3g}, at most {tolerance}"


def with_gradients(
    dice: random.Random, fused: Callable, reference: Callable, leaves: Sequence[Tensor], what: object
) -> None:
    """``fused`` and its gradients are those of ``reference`` in fp64."""
    dtype = leaves[0].dtype
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, wanted = fused(*leaves), reference(*exact)
    grad = tensor(dice, *out.shape, dtype=dtype)
    near(out, wanted.to(dtype), TOLERANCE[dtype], what)
    gradients = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, exact, grad.double())
    for i, (a, b) in enumerate(zip(*gradients, strict=True)):
        near(a, b.to(dtype), GRADIENT_TOLERANCE[dtype], (what, "gradient", i))


def norm(dice: random.Random) -> None:
    dtype, b, n = dice.choice(DTYPES), dice.randrange(1, 4), dice.randrange(1, 12)
    d = dice.choice((1, 7, 8, 16, 33, 64, 128, 264, 512, 1000, 2056, 3840, 4104))
    x, residual, weight = (
        tensor(dice, b, n, d, dtype=dtype),
        tensor(dice, b, n, d, dtype=dtype),
        tensor(dice, d, dtype=dtype),
    )
    given = tensor(dice, *dice.choice(((b, 1, d), (1, 1, d), (b, n, d))), dtype=dtype)
    if dice.random() < 0.5:
        fused, reference = ops.norm_modulate, ops.norm_modulate_reference
        steps = [lambda *leaves, step=step: step(*leaves, 1e-5) for step in (fused, reference)]
    else:
        fused, reference = ops.gate_norm_residual, ops.gate_norm_residual_reference
        steps = [lambda x, *rest, step=step: step(residual.to(x.dtype), x, *rest, 1e-5) for step in (fused, reference)]
    with_gradients(dice, *steps, (x, weight, given), (fused.__name__, x.shape, given.shape, dtype))


def rounded(dice: random.Random) -> None:
    dtype, b, n = dice.choice(DTYPES), dice.randrange(1, 4), dice.randrange(1, 12)
    d, to = dice.choice((1, 7, 16, 33, 64, 264, 512, 1000, 3840, 4104)), dice.choice((torch.int8, torch.float8_e4m3fn))
    x, weight = tensor(dice, b, n, d, dtype=dtype), tensor(dice, d, dtype=dtype)
    given = tensor(dice, *dice.choice(((b, 1, d), (1, 1, d), (b, n, d))), dtype=dtype)
    values, scale, _ = ops.norm_modulate_quantize(x, weight, given, 1e-5, to)
    exact = ops.norm_modulate_reference(x.double(), weight.double(), given.double(), 1e-5)
    what = "norm_modulate_quantize", x.shape, x.stride(), given.shape, dtype, to
    near(scale, ops.quantize_rows(exact, to).scale, 1e-5, what)
    step = 1.0 if to == torch.int8 else values.double().abs().clamp(min=2**-6) / 8
    off = (values.double() - exact / scale).abs() / step
    assert off.max() <= 0.51, (what, off.max())


def rope(dice: random.Random) -> None:
    dtype, b, n, h = dice.choice(DTYPES), dice.randrange(1, 3), dice.randrange(1, 50), dice.randrange(1, 8)
    e = 2 * dice.choice((1, 3, 4, 8, 16, 32, 48, 64, 128, 160, 256))
    x, weight = tensor(dice, b, n, h, e, dtype=dtype), tensor(dice, e, dtype=dtype)
    angles = 3 * tensor(dice, dice.choice((1, b)), n, 1, e // 2)
    cos, sin = angles.cos(), angles.sin()
    with_gradients(
        dice,
        lambda *leaves: ops.qk_norm_rope(*leaves, (cos, sin), 1e-5),
        lambda *leaves: ops.qk_norm_rope_reference(*leaves, (cos.double(), sin.double()), 1e-5),
        (x, weight),
        ("qk_norm_rope", x.shape, x.stride(), angles.shape, dtype),
    )


def silu(dice: random.Random) -> None:
    dtype, shape = dice.choice(DTYPES), [dice.randrange(1, 40) for _ in range(dice.randrange(1, 4))]
    x, y = tensor(dice, *shape, dtype=dtype), tensor(dice, *shape, dtype=dtype)
    with_gradients(dice, ops.silu_mul, ops.silu_mul_reference, (x, y), ("silu_mul", shape, dtype))


def patchify(dice: random.Random) -> None:
    p, c = dice.choice((1, 2, 3, 8, 16, 24, 64)), dice.choice((3, 3, 3, 1, 4))
    h, w = p * dice.randrange(1, 4), p * dice.randrange(1, 4)
    pixels, to = tensor(dice, dice.randrange(1, 3), c, h, w, dtype=dice.choice(DTYPES)), dice.choice(DTYPES)
    what = "patchify", pixels.shape, pixels.stride(), p, pixels.dtype, to
    tokens = ops.patchify(pixels, p, to)
    assert torch.equal(tokens, ops.patchify_reference(pixels, p, to)), what
    tokens = tensor(dice, *tokens.shape, dtype=to)
    back = ops.unpatchify(tokens, p, h, w, pixels.dtype)
    assert torch.equal(back, ops.unpatchify_reference(tokens, p, h, w, pixels.dtype)), (what, tokens.stride())


def update(dice: random.Random) -> None:
    dtype = dice.choice(DTYPES)
    shape = dice.randrange(1, 3), 3, dice.randrange(1, 20), dice.choice((1, 7, 8, 16, 24, 40))
    x, raw = tensor(dice, *shape), tensor(dice, *shape, dtype=dtype)
    negative = tensor(dice, *shape, dtype=dtype) if dice.random() < 0.6 else None
    wanted = ops.euler_step_reference(x, raw, -0.04, negative, 2.3)
    what = "euler_step", shape, x.stride(), raw.stride(), dtype
    assert torch.equal(ops.euler_step(x, raw, -0.04, negative, 2.3), wanted), what
    if all(stride > 0 or size == 1 for stride, size in zip(x.stride(), shape, strict=True)):
        ops.euler_step_(x, raw, -0.04, negative, 2.3)
        assert torch.equal(x, wanted), (what, "in place")


def uint8(dice: random.Random) -> None:
    pixels = tensor(
        dice, dice.randrange(1, 3), dice.choice((3, 3, 1)), dice.randrange(1, 20), dice.choice((1, 7, 16, 32, 48))
    )
    assert torch.equal(ops.to_uint8(pixels), ops.to_uint8_reference(pixels)), (
        "to_uint8",
        pixels.shape,
        pixels.stride(),
    )


def level_size(dice: random.Random) -> tuple[int, int, int, int, int]:
    """Batch, height, width, and the rows that are wanted."""
    height, width = 2 * dice.randrange(1, 14), 2 * dice.choice((1, 2, 5, 16, 31, 32, 33, 40, 70))
    start = dice.randrange(height)
    return dice.randrange(1, 3), height, width, start, dice.randrange(start + 1, height + 1)


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size).requires_grad_(False).bfloat16()


def encode(dice: random.Random) -> None:
    batch, height, width, start, stop = level_size(dice)
    channels, outputs, pool = (
        dice.choice((3, 2 * dice.randrange(1, 20))),
        2 * dice.randrange(1, 20),
        dice.random() < 0.6,
    )
    if pool:
        start, stop = start // 2 * 2, (stop + 1) // 2 * 2
    first, last = max(start - 1 - dice.randrange(3), 0), min(stop + 1 + dice.randrange(3), height)
    x = tensor(dice, batch, height, width, channels, dtype=dice.choice((torch.float32, torch.bfloat16)))[:, first:last]
    inputs = x, *head.encoder_weights(convolution(channels, outputs)), first, start, stop, height, True, pool
    what = "head_encode", x.shape, x.stride(), x.dtype, outputs, start, stop, height, pool
    for got, wanted in zip(torch.ops.l2p_fast.head_encode(*inputs), head.head_encode_reference(*inputs), strict=True):
        near(got, wanted, 4e-3, what)


def decode(dice: random.Random) -> None:
    batch, height, width, start, stop = level_size(dice)
    channels, skips, outputs = (2 * dice.randrange(1, 20) for _ in range(3))
    up = convolution(channels, dice.randrange(1, 20))
    last = convolution(outputs, 3, 1) if dice.random() < 0.4 else None
    weights = head.decoder_weights(up, convolution(up.out_channels + skips, outputs), last)
    x_rows = slice(max(start // 2 - 1, 0), min((stop + 1) // 2 + 1, height // 2))
    rows = slice(max(start - 1, 0), min(stop + 1, height))
    x = torch.randn(batch, height // 2, width // 2, channels).bfloat16()[:, x_rows]
    skip = torch.randn(batch, height, width, skips).bfloat16()[:, rows]
    if dice.random() < 0.5:
        x, skip = x.contiguous(), skip.contiguous()
    inputs = x, skip, *weights, x_rows.start, rows.start, start, stop, height
    what = "head_decode", x.shape, skip.shape, outputs, start, stop, height, last is not None
    near(torch.ops.l2p_fast.head_decode(*inputs), head.head_decode_reference(*inputs), 6e-3, what)


CASES = (norm, rounded, rope, silu, patchify, update, uint8, encode, decode)


def main(seconds: float = 60, first_seed: int = 0) -> int:
    end, runs, failures = time.monotonic() + seconds, Counter(), 0
    for seed in itertools.count(first_seed):
        dice = random.Random(seed)
        torch.manual_seed(seed)
        case = dice.choice(CASES)
        runs[case.__name__] += 1
        try:
            case(dice)
        except (AssertionError, RuntimeError) as error:
            failures += 1
            print(f"seed {seed}: {str(error)[:400]}", flush=True)
        if time.monotonic() >= end:
            break
    counted = ", ".join(f"{count} {name}" for name, count in sorted(runs.items()))
    print(f"{runs.total()} cases ({counted}), {failures} failures")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3])))
