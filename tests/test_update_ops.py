"""The sampler's update and the final picture: bit by bit what plain PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from l2p_fast import ops
from l2p_fast.errors import UserError
from l2p_fast.sampling import flow
from tests.far import far

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (B, C, H, W): the smallest, odd sizes, whole vectors, more than one thread's lines
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 3, 16, 48), (2, 4, 3, 33), (1, 3, 300, 160))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    every_other, off_by_one = wide[..., : 2 * x.shape[-1] : 2], wide.clone()[..., 1 : x.shape[-1] + 1]
    return {
        "dense": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "every other": every_other.copy_(x),
        "off by one": off_by_one.copy_(x),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", (True, False))
def test_a_step_is_bit_by_bit_that_of_flow(guided, dtype):
    sigma, sigma_next = flow.sigmas(7)[2:4]
    dt, g = float(sigma_next - sigma), 2.3
    for shape in SHAPES:
        x, raw, negative = normal(*shape), normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)
        v = flow.velocity(raw.float())
        if guided:
            v = flow.guide(v, flow.velocity(negative.float()), g)
        want = flow.advance(x, v, sigma, sigma_next)
        args = (dt, negative, g) if guided else (dt,)
        assert torch.equal(ops.euler_step(x, raw, *args), want)
        assert torch.equal(ops.euler_step_reference(x, raw, *args), want)
        state = x.clone()
        assert ops.euler_step_(state, raw, *args) is state and torch.equal(state, want)


def test_a_step_of_strided_pictures():
    x, raw, negative = normal(2, 3, 6, 16), normal(2, 3, 6, 16, seed=1), normal(2, 3, 6, 16, seed=2)
    want = ops.euler_step_reference(x, raw, -0.04, negative, 3.0)
    for name, state in strided(x).items():
        for other, half in strided(raw).items():
            out = ops.euler_step(state, half, -0.04, negative, 3.0)
            assert torch.equal(out, want) and out.is_contiguous(), (name, other)
            assert torch.equal(ops.euler_step(state, raw, -0.04, strided(negative)[other], 3.0), want), (name, other)
        ops.euler_step_(state, raw, -0.04, negative, 3.0)
        assert torch.equal(state, want), name


def test_offsets_beyond_32_bits():
    for width in (16, 5):
        x, raw, negative = normal(2, 3, 4, width), normal(2, 3, 4, width, seed=1), normal(2, 3, 4, width, seed=2)
        state, want = far(x), ops.euler_step_reference(x, raw, -0.04, negative, 3.0)
        assert torch.equal(ops.to_uint8(state), ops.to_uint8_reference(x))
        assert torch.equal(ops.euler_step_(state, far(raw), -0.04, far(negative), 3.0), want)


def test_bytes_are_those_of_plain_pytorch():
    for shape in SHAPES:
        for name, pixels in strided(0.8 * normal(*shape)).items():
            out = ops.to_uint8(pixels)
            assert out.is_contiguous() and torch.equal(out, ops.to_uint8_reference(pixels)), (shape, name)
    steps = (torch.arange(256, dtype=torch.float64) - 127.5) / 127.5
    near = torch.cat([steps + d for d in (0, 1e-7, -1e-7, 0.5 / 127.5, -0.5 / 127.5)]).float()
    near = torch.cat([near, torch.tensor([-1.0, 1.0, 2.0, -7.0, 1e30, -1e30, float("inf"), -float("inf")])])
    pixels = near.reshape(1, 1, 1, -1)
    assert torch.equal(ops.to_uint8(pixels), ops.to_uint8_reference(pixels))
    kept = torch.arange(256).reshape(1, 1, 1, 256)  # what was read from a file is written as it was
    assert torch.equal(ops.to_uint8(kept / 127.5 - 1).flatten(), kept.flatten().to(torch.uint8))


def test_empty():
    assert ops.euler_step(torch.empty(0, 3, 4, 4), torch.empty(0, 3, 4, 4), -0.1).shape == (0, 3, 4, 4)
    assert ops.euler_step_(torch.empty(1, 3, 0, 4), torch.empty(1, 3, 0, 4), -0.1).numel() == 0
    assert ops.to_uint8(torch.empty(0, 3, 4, 5)).shape == (0, 4, 5, 3)


def test_opcheck():
    library = torch.ops.l2p_fast
    x, raw, negative = normal(1, 3, 4, 6), normal(1, 3, 4, 6).bfloat16(), normal(1, 3, 4, 6, seed=1).bfloat16()
    for half in (None, negative):
        opcheck(library.euler_step.default, (x, raw, -0.1, half, 2.0))
        opcheck(library.euler_step_.default, (x, raw, -0.1, half, 2.0))
    opcheck(library.to_uint8.default, (x,))


def test_mistakes_are_named():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(UserError, match="the state must be .* float32, got .*float64"):
        ops.euler_step(x.double(), x, -0.1)
    with pytest.raises(UserError, match=r"like the state, of one floating dtype, got \(3, 4, 4\)"):
        ops.euler_step(x, x[0], -0.1)
    with pytest.raises(UserError, match="bfloat16"):
        ops.euler_step(x, x, -0.1, x.bfloat16(), 2.0)
    with pytest.raises(UserError, match="int64"):
        ops.euler_step_(x, x.long(), -0.1)
    with pytest.raises(UserError, match=r"pixels must be \(B, C, H, W\)"):
        ops.to_uint8(x[0])


def test_the_ops_themselves_never_read_past_their_inputs():
    if not ops.extension_status().startswith("loaded"):
        pytest.skip(ops.extension_status())
    x, library = torch.zeros(1, 3, 4, 4), torch.ops.l2p_fast
    with pytest.raises(RuntimeError, match="raw must have the shape"):
        library.euler_step(x, x[:, :, :3], -0.1, None, 1.0)
    with pytest.raises(RuntimeError, match="negative must have the shape"):
        library.euler_step_(x, x, -0.1, x[..., :2], 1.0)
    with pytest.raises(RuntimeError, match="float32"):
        library.to_uint8(x.half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu(dtype):
    if "CUDA" not in ops.extension_status():
        pytest.skip(ops.extension_status())
    for shape in SHAPES:
        x, raw, negative = normal(*shape), normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)
        for half in (None, negative):
            want = ops.euler_step(x, raw, -0.04, half, 2.3)
            for state in strided(x).values():
                on_gpu = [t.cuda() if t is not None else None for t in (raw, half)]
                assert torch.equal(ops.euler_step(state.cuda(), on_gpu[0], -0.04, on_gpu[1], 2.3).cpu(), want)
        for pixels in strided(x).values():
            assert torch.equal(ops.to_uint8(pixels.cuda()).cpu(), ops.to_uint8(x))
