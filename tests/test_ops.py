"""patchify and unpatchify: compiled kernels, reference, shapes and gradients agree. Moving bytes is exact or wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from l2p_fast import ops
from l2p_fast.errors import UserError
from tests.far import far

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (B, C, H, W, P): the smallest, odd counts and sizes, other channel counts, a published patch size.
SHAPES = (
    (1, 3, 1, 1, 1),
    (2, 3, 6, 9, 3),
    (1, 3, 16, 48, 16),
    (3, 1, 8, 4, 4),
    (2, 4, 10, 5, 5),
    (1, 3, 320, 160, 160),
)


def picture(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layout_by_loops(pixels: torch.Tensor, p: int) -> torch.Tensor:
    """The layout as SPEC words it, one value at a time."""
    b, c, height, width = pixels.shape
    tokens = pixels.new_empty(b, (height // p) * (width // p), p * p * c)
    for y in range(height):
        for x in range(width):
            token, feature = y // p * (width // p) + x // p, (y % p * p + x % p) * c
            tokens[:, token, feature : feature + c] = pixels[:, :, y, x]
    return tokens


@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_layout_is_row_column_channel(shape):
    pixels = picture(*shape[:4])
    expected = layout_by_loops(pixels, shape[4])
    assert torch.equal(ops.patchify_reference(pixels, shape[4]), expected)
    assert torch.equal(ops.patchify(pixels, shape[4]), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_equals_reference_in_every_dtype(shape, given, to):
    *size, p = shape
    pixels = picture(*size, dtype=given)
    tokens = ops.patchify(pixels, p, to)
    assert tokens.dtype == to and tokens.is_contiguous()
    assert torch.equal(tokens, ops.patchify_reference(pixels, p, to))
    back = ops.unpatchify(tokens, p, *size[2:], given)
    assert back.dtype == given and back.is_contiguous()
    assert torch.equal(back, ops.unpatchify_reference(tokens, p, *size[2:], given))
    if to.itemsize >= given.itemsize and {given, to} != {torch.float16, torch.bfloat16}:
        assert torch.equal(back, pixels)


def test_rounding_of_special_values():
    tie_even, tie_odd = 1 + 2**-8, 1 + 3 * 2**-8  # halfway between two bfloat16 values
    inf = float("inf")
    values = [0.0, -0.0, tie_even, tie_odd, -tie_odd, 3.4e38, -3.4e38, 1e-40, inf, -inf, float("nan"), 7.0]
    pixels = torch.tensor(values).reshape(1, 3, 2, 2)
    tokens = ops.patchify(pixels, 2, torch.bfloat16)
    torch.testing.assert_close(
        tokens, ops.patchify_reference(pixels, 2, torch.bfloat16), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("to", (torch.float32, torch.bfloat16))
def test_strided_inputs(to):
    base = picture(4, 3, 40, 48)
    views = {
        "slice": base[1:3, :, 8:40, 16:],
        "channels last": base[:, :, :32, :32].contiguous(memory_format=torch.channels_last),
        "transposed": base[:, :, :32, :32].transpose(2, 3),
        "every other row and column": picture(2, 3, 64, 64)[:, :, ::2, ::2],
        "flipped channels": base[:, [2, 1, 0], :32, :32],
        "expanded": picture(1, 3, 1, 1).expand(2, 3, 16, 32),
        "offset by one": picture(3 * 16 * 16 + 1).narrow(0, 1, 3 * 16 * 16).view(1, 3, 16, 16),
    }
    for name, view in views.items():
        assert torch.equal(ops.patchify(view, 16, to), ops.patchify_reference(view, 16, to)), name
    tokens = picture(2, 12, 4 * 4 * 3 + 2)
    for name, view in {
        "features cut": tokens[:, :, 1:-1],
        "tokens reversed in memory": tokens[..., :48].transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": picture(1, 1, 1).expand(2, 12, 48),
    }.items():
        assert torch.equal(ops.unpatchify(view, 4, 12, 16, to), ops.unpatchify_reference(view, 4, 12, 16, to)), name


def test_offsets_beyond_32_bits():
    for channels, dtype in ((3, torch.bfloat16), (1, torch.float32)):
        pixels = picture(2, channels, 16, 32, dtype=dtype)
        tokens = ops.patchify_reference(pixels, 16)
        assert torch.equal(ops.patchify(far(pixels), 16), tokens)
        assert torch.equal(ops.unpatchify(far(tokens), 16, 16, 32), pixels)


def test_empty():
    assert ops.patchify(torch.empty(0, 3, 8, 8), 4).shape == (0, 4, 48)
    assert ops.patchify(torch.empty(2, 3, 0, 8), 4).shape == (2, 0, 48)
    assert ops.patchify(torch.empty(2, 0, 8, 8), 4).shape == (2, 4, 0)
    assert ops.unpatchify(torch.empty(0, 4, 48), 4, 8, 8).shape == (0, 3, 8, 8)
    assert ops.unpatchify(torch.empty(2, 0, 48), 4, 0, 8).shape == (2, 3, 0, 8)


def test_more_runs_than_one_thread_takes():
    pixels = picture(2, 3, 256, 512)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(ops.patchify(pixels, 64), ops.patchify_reference(pixels, 64))
        assert torch.equal(ops.unpatchify(ops.patchify(pixels, 16), 16, 256, 512), pixels)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    pixels = picture(2, 3, 8, 12).requires_grad_()
    opcheck(torch.ops.l2p_fast.patchify.default, (pixels, 4, dtype))
    opcheck(torch.ops.l2p_fast.patchify.default, (picture(1, 3, 8, 8)[:, :, :, ::2], 4, dtype))
    tokens = picture(2, 6, 48).requires_grad_()
    opcheck(torch.ops.l2p_fast.unpatchify.default, (tokens, 4, 8, 12, dtype))


def test_gradients():
    pixels = picture(2, 3, 4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.patchify(x, 2), pixels)
    assert torch.autograd.gradgradcheck(lambda x: ops.patchify(x, 2), pixels)
    tokens = picture(2, 6, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.unpatchify(x, 2, 4, 6), tokens)


def test_each_is_the_others_backward():
    pixels = picture(1, 3, 8, 8).requires_grad_()
    grad = picture(1, 4, 48, dtype=torch.bfloat16, seed=1)
    ops.patchify(pixels, 4, torch.bfloat16).backward(grad)
    assert torch.equal(pixels.grad, ops.unpatchify(grad, 4, 8, 8, torch.float32))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="height must be a multiple of the patch size 16, got 50; try 48"):
        ops.patchify(torch.empty(1, 3, 50, 64), 16)
    with pytest.raises(UserError, match="width"):
        ops.patchify(torch.empty(1, 3, 64, 8), 16)
    with pytest.raises(UserError, match=r"\(B, C, H, W\)"):
        ops.patchify(torch.empty(3, 64, 64), 16)
    with pytest.raises(UserError, match="at least 1"):
        ops.patchify(torch.empty(1, 3, 64, 64), 0)
    with pytest.raises(UserError, match="int64"):
        ops.patchify(torch.zeros(1, 3, 4, 4, dtype=torch.int64), 4)
    with pytest.raises(UserError, match="4 tokens of a multiple of 16 features"):
        ops.unpatchify(torch.empty(1, 5, 48), 4, 8, 8)
    with pytest.raises(UserError, match="features"):
        ops.unpatchify(torch.empty(1, 4, 50), 4, 8, 8)
    with pytest.raises(UserError, match=r"h\*w"):
        ops.unpatchify(torch.empty(4, 48), 4, 8, 8)


def test_the_op_itself_never_reads_past_its_input():
    if not ops.extension_status().startswith("loaded"):
        pytest.skip(ops.extension_status())
    with pytest.raises(RuntimeError, match="multiples of the patch size"):
        torch.ops.l2p_fast.patchify(torch.empty(1, 3, 7, 8), 4, torch.float32)
    with pytest.raises(RuntimeError, match="token count"):
        torch.ops.l2p_fast.unpatchify(torch.empty(1, 3, 48), 4, 8, 8, torch.float32)


def run_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    ).stdout.strip()


def test_works_and_says_so_without_the_extension():
    said = run_python(
        "import torch; from l2p_fast import ops; x = torch.randn(1, 3, 8, 8)\n"
        "assert torch.equal(ops.unpatchify(ops.patchify(x, 4), 4, 8, 8), x); print(ops.extension_status())",
        L2P_EXTENSION="0",
    )
    assert said == "switched off by L2P_EXTENSION=0; plain PyTorch paths are used"


def test_an_avx2_cpu_can_be_pretended(monkeypatch):
    assert run_python("from l2p_fast import ops; print(ops.cpu_has_fast_bf16())", L2P_CPU="avx2") == "False"
    monkeypatch.setenv("L2P_CPU", "i386")
    with pytest.raises(UserError, match="L2P_CPU must be avx2 or unset, got 'i386'"):
        ops.cpu_has_fast_bf16.__wrapped__()


def test_a_broken_extension_is_named(tmp_path, monkeypatch):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(ops, "_PACKAGE", tmp_path)
    monkeypatch.delenv("L2P_EXTENSION", raising=False)
    load = ops._load_extension.__wrapped__
    assert load().startswith("failed to load: ") and "_C.abi3.so" in load()
    (tmp_path / "_C.abi3.so").unlink()
    assert load() == f"not built: no _C.abi3.so in {tmp_path}"
    (tmp_path / "_not_built.txt").write_text("no C++ compiler was found\n")
    assert load() == "not built: no C++ compiler was found"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_cuda_equals_cpu(shape, given, to):
    if "CUDA" not in ops.extension_status():
        pytest.skip(ops.extension_status())
    *size, p = shape
    pixels = picture(*size, dtype=given)
    for view in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        tokens = ops.patchify(view.cuda(), p, to)
        assert torch.equal(tokens.cpu(), ops.patchify_reference(pixels, p, to))
        back = ops.unpatchify(tokens, p, *size[2:], given).cpu()
        assert torch.equal(back, ops.unpatchify_reference(tokens.cpu(), p, *size[2:], given))
