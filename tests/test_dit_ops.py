"""The transformer's fused steps: kernels, references, shapes and gradients agree; low precision is as good as plain."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from l2p_fast import ops
from l2p_fast.models.blocks import RMSNorm
from tests.far import far

EPS = 1e-5
# fp32 rounding of sums in another order; float16 and bfloat16 are held against fp32 instead
EXACT = {torch.float32: dict(rtol=2e-5, atol=2e-6), torch.float64: dict(rtol=1e-12, atol=1e-13)}
# (B, N, D): the smallest, odd sizes, a size with whole vectors, more than one slab of rows
BLOCKS = ((1, 1, 1), (2, 5, 70), (3, 4, 128), (1, 3, 33), (2, 45, 6000))
# (B, N, H, E), the third with a slab that begins within a token
HEADS = ((1, 1, 1, 2), (2, 5, 3, 34), (1, 280, 7, 128), (2, 3, 1, 6))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = True) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad)


def block_inputs(shape, dtype=torch.float32, modulation=None, steps=("norm_modulate", "gate_norm_residual")):
    """step -> (fused, reference, arguments) with x, weight and modulation that require gradients."""
    b, n, d = shape
    x, residual = normal(b, n, d, dtype=dtype), normal(b, n, d, dtype=dtype, seed=1)
    weight = (1 + 0.2 * normal(d, dtype=dtype, seed=2, grad=False)).requires_grad_()
    given = normal(*(modulation or (b, 1, d)), dtype=dtype, seed=3)
    cases = {
        "norm_modulate": (ops.norm_modulate, ops.norm_modulate_reference, (x, weight, given, EPS)),
        "gate_norm_residual": (
            ops.gate_norm_residual,
            ops.gate_norm_residual_reference,
            (residual, x, weight, given, EPS),
        ),
    }
    return {step: cases[step] for step in steps}


def head_inputs(shape, dtype=torch.float32, rows=None):
    b, n, _, e = shape
    angles = 3 * normal(rows or b, n, 1, e // 2, seed=4, grad=False)
    weight = (1 + 0.2 * normal(e, dtype=dtype, seed=2, grad=False)).requires_grad_()
    args = (normal(*shape, dtype=dtype), weight, (angles.cos(), angles.sin()), EPS)
    return {"qk_norm_rope": (ops.qk_norm_rope, ops.qk_norm_rope_reference, args)}


def silu_inputs(shape, dtype=torch.float32):
    args = 3 * normal(*shape, dtype=dtype, grad=False), normal(*shape, dtype=dtype, seed=1)
    args[0].requires_grad_()
    return {"silu_mul": (ops.silu_mul, ops.silu_mul_reference, args)}


def every_step(dtype=torch.float32):
    for shape in BLOCKS:
        yield from block_inputs(shape, dtype).items()
    for shape in HEADS:
        yield from head_inputs(shape, dtype).items()
    for shape in ((1,), (3, 37), (2, 5, 512)):
        yield from silu_inputs(shape, dtype).items()


def result_and_gradients(function, args, dtype=None) -> list[torch.Tensor]:
    """What comes out, and the gradients of a fixed random weighting of it, computed in ``dtype``."""

    def cast(value):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return value.detach().to(dtype or value.dtype).requires_grad_()
        return value

    args = [cast(value) for value in args]
    leaves = [value for value in args if isinstance(value, torch.Tensor) and value.requires_grad]
    out = function(*args)
    grad = normal(*out.shape, seed=9, grad=False).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def agree(got, wanted, name, **tolerance) -> None:
    assert len(got) == len(wanted)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (name, i)
        # a sum over many tokens is judged by its own size
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a / scale, b / scale, **tolerance, msg=lambda text, i=i: f"{name}, {i}: {text}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_reference_and_its_autograd(dtype):
    for name, (fused, reference, args) in every_step(dtype):
        got = result_and_gradients(fused, args)
        assert all(t.is_contiguous() for t in got)
        agree(got, result_and_gradients(reference, args), (name, args[0].shape), **EXACT[dtype])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_is_at_most_twice_the_plain_modules_error(dtype):
    wide = [
        block_inputs((2, 64, 256), dtype),
        head_inputs((2, 32, 4, 64), dtype),
        silu_inputs((2, 64, 256), dtype),
    ]
    for name, (fused, reference, args) in (item for cases in wide for item in cases.items()):
        exact = result_and_gradients(reference, args, torch.float32)
        plain, ours = result_and_gradients(reference, args), result_and_gradients(fused, args)
        for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            assert a.dtype == dtype and b.dtype == dtype
            assert (a.float() - c).norm() <= 2 * (b.float() - c).norm() + 1e-12, (name, i)


def test_every_way_a_modulation_is_shared():
    for modulation in ((1, 1, 24), (3, 1, 24), (3, 5, 24), (1, 5, 24)):
        for name, (fused, reference, args) in block_inputs((3, 5, 24), modulation=modulation).items():
            agree(
                result_and_gradients(fused, args),
                result_and_gradients(reference, args),
                (name, modulation),
                **EXACT[torch.float32],
            )
    # as in a block: four chunks of one projection
    chunks = normal(2, 4 * 24).unsqueeze(1).chunk(4, dim=-1)
    x, weight = normal(2, 5, 24, seed=1), normal(24, seed=2)
    for chunk in chunks:
        want = ops.gate_norm_residual_reference(x, x, weight, chunk, EPS)
        torch.testing.assert_close(ops.gate_norm_residual(x, x, weight, chunk, EPS), want)


def test_one_table_of_angles_for_all_samples():
    for fused, reference, args in head_inputs((3, 5, 2, 16), rows=1).values():
        agree(
            result_and_gradients(fused, args), result_and_gradients(reference, args), "shared", **EXACT[torch.float32]
        )


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the shape of x (2, 6, ...) with other strides."""
    wide = normal(4, 9, *x.shape[2:-1], 2 * x.shape[-1] + 1, seed=5, grad=False).to(x.dtype)
    return {
        "slice": wide[1:3, 2:8, ..., : x.shape[-1]],
        "off by one": wide[1:3, 2:8, ..., 1 : x.shape[-1] + 1],
        "every other": wide[1:3, 2:8, ..., : 2 * x.shape[-1] : 2],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": x[:1, :1].expand_as(x),
        "one value": x[(slice(0, 1),) * x.ndim].expand_as(x),
    }


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides(dtype):
    tolerance = EXACT[torch.float32] if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    weight = normal(32, dtype=dtype, seed=2)
    x = normal(2, 6, 32, dtype=dtype, grad=False)
    scale = views(normal(2, 6, 32, dtype=dtype, grad=False))
    for name, view in views(x).items():
        for other, given in scale.items():
            for modulation in (given, given[:, :1]):
                for fused, reference, args in (
                    (ops.norm_modulate, ops.norm_modulate_reference, (view, weight, modulation, EPS)),
                    (
                        ops.gate_norm_residual,
                        ops.gate_norm_residual_reference,
                        (given, view, weight, modulation, EPS),
                    ),
                ):
                    torch.testing.assert_close(fused(*args), reference(*args), **tolerance, msg=f"{name}, {other}")
        torch.testing.assert_close(ops.silu_mul(view, x), ops.silu_mul_reference(view, x), **tolerance, msg=name)
    angles = normal(2, 6, 1, 8, grad=False)
    for name, view in views(normal(2, 6, 3, 16, dtype=dtype, grad=False)).items():
        for turn in views(angles).values():
            rope = turn.cos(), turn.contiguous().sin()
            args = (view, weight[::2], rope, EPS)
            torch.testing.assert_close(
                ops.qk_norm_rope(*args), ops.qk_norm_rope_reference(*args), **tolerance, msg=name
            )


def test_offsets_beyond_32_bits():
    for width in (32, 6):
        for inputs in (block_inputs((2, 3, width)), head_inputs((2, 3, 2, width))):
            for name, (fused, reference, args) in inputs.items():
                given = [far(a.detach()) if isinstance(a, torch.Tensor) and a.ndim > 2 else a for a in args]
                with torch.no_grad():
                    torch.testing.assert_close(fused(*given), reference(*args), **EXACT[torch.float32], msg=name)


def test_gradients_of_strided_results():
    """Gradients arrive transposed, or as one number for all."""
    for name, (fused, reference, args) in {**block_inputs((2, 6, 32)), **head_inputs((2, 6, 3, 16))}.items():
        for reduce in (
            lambda y: y.sum(),
            lambda y: (y.transpose(0, 1).contiguous() * normal(6, 2, *y.shape[2:], seed=7, grad=False)).sum(),
        ):
            leaves = [a for a in args if isinstance(a, torch.Tensor)]
            got = torch.autograd.grad(reduce(fused(*args)), leaves)
            agree(got, torch.autograd.grad(reduce(reference(*args)), leaves), name, rtol=1e-4, atol=1e-5)


def test_empty():
    for shape in ((0, 4, 8), (2, 0, 8)):
        for name, (fused, _, args) in block_inputs(shape, modulation=(shape[0], 1, 8)).items():
            out, *grads = result_and_gradients(fused, args)
            assert out.shape == shape and all((grad == 0).all() for grad in grads), name
    for fused, _, args in head_inputs((0, 4, 2, 8)).values():
        out, *grads = result_and_gradients(fused, args)
        assert out.shape == (0, 4, 2, 8) and (grads[1] == 0).all()
    assert ops.silu_mul(torch.empty(0, 3), torch.empty(0, 3)).shape == (0, 3)


# --- In 8 bits -------------------------------------------------------------------------------------------------------
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def in_steps(values: torch.Tensor) -> torch.Tensor:
    """Values of 8 bits as numbers that count the dtype's own values: neighbours differ by 1."""
    if values.dtype == torch.int8:
        return values.int()
    codes = values.view(torch.uint8).int()
    return torch.where(codes < 128, codes, 128 - codes)


def decoded(rows: ops.QuantizedRows) -> torch.Tensor:
    return rows.values.double() * rows.scale.double()


@pytest.mark.parametrize("to", EIGHT_BITS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_norm_to_8_bits_is_the_norm_and_then_the_rounding(dtype, to):
    for shape in (*BLOCKS, (2, 9, 256)):
        for modulation in ((shape[0], 1, shape[2]), (1, 1, shape[2]), shape):
            *args, _ = block_inputs(shape, dtype, modulation)["norm_modulate"][2]
            got = ops.norm_modulate_quantize(*args, EPS, to)
            wanted = ops.norm_modulate_quantize_reference(*(t.detach() for t in args), EPS, to)
            assert got.dtype == dtype and got.values.dtype == to and got.values.shape == shape
            assert got.values.is_contiguous() and got.scale.shape == (*shape[:2], 1)
            torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-6, atol=0)
            steps = (in_steps(got.values) - in_steps(wanted.values)).abs()
            assert steps.max() <= 1 and steps.count_nonzero() <= 2 + steps.numel() // 1000, (shape, modulation)


@pytest.mark.parametrize("to", EIGHT_BITS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_norm_to_8_bits_is_no_less_exact_than_two_roundings(dtype, to):
    for shape in ((2, 64, 256), (1, 9, 70)):
        *args, _ = (
            a.detach() if isinstance(a, torch.Tensor) else a for a in block_inputs(shape, dtype)["norm_modulate"][2]
        )
        exact = ops.norm_modulate_reference(*(t.double() for t in args), EPS)
        once = ops.norm_modulate_quantize(*args, EPS, to)
        twice = ops.norm_modulate_quantize_reference(*args, EPS, to)
        assert (decoded(once) - exact).norm() <= 1.02 * (decoded(twice) - exact).norm()
        torch.testing.assert_close(once.scale, twice.scale, rtol=2**-6, atol=0)
        largest = 127 if to == torch.int8 else 448
        assert (once.values.float().abs().amax(-1) == largest).all()


@pytest.mark.parametrize("to", EIGHT_BITS)
def test_norm_to_8_bits_of_any_strides(to):
    weight = normal(32, dtype=torch.bfloat16, seed=2)
    for name, view in views(normal(2, 6, 32, dtype=torch.bfloat16, grad=False)).items():
        for other, scale in views(normal(2, 6, 32, dtype=torch.bfloat16, seed=1, grad=False)).items():
            got = ops.norm_modulate_quantize(view, weight, scale, EPS, to)
            want = ops.norm_modulate_quantize(view.contiguous(), weight, scale.contiguous(), EPS, to)
            torch.testing.assert_close(got.scale, want.scale, rtol=1e-6, atol=0, msg=f"{name}, {other}")
            steps = (in_steps(got.values) - in_steps(want.values)).abs()
            assert steps.max() <= 1 and steps.count_nonzero() <= 2, (name, other)


@pytest.mark.parametrize("to", EIGHT_BITS)
def test_every_value_rounds_to_the_nearest_of_8_bits(to):
    """Of rows whose largest value is the dtype's own, so that scales are 1: ties and what is below them, too."""
    values = torch.arange(-127, 128).to(to) if to == torch.int8 else torch.arange(256).to(torch.uint8).view(to)
    values = values.float()[values.float().isfinite()].unique()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, values * 1.03, values * 0.97, values / 300])
    x = x[x.abs() <= values.max()].reshape(1, 1, -1)
    # a norm that does nothing: the weight takes back what the root of the mean square takes away
    weight = x.square().mean().sqrt().expand(x.shape[-1])
    got = ops.norm_modulate_quantize(x.double(), weight.double(), torch.zeros(1, 1, 1).double().expand_as(x), 0.0, to)
    torch.testing.assert_close(got.scale, torch.ones(1, 1, 1), rtol=1e-6, atol=0)
    off = (got.values.float() - x).abs()
    nearest = (values[:, None] - x.flatten()).abs().amin(0)
    torch.testing.assert_close(off.flatten(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to", EIGHT_BITS)
def test_norm_to_8_bits_of_extremes(to):
    weight, scale = torch.ones(64), torch.zeros(1, 1, 64)
    x = normal(1, 4, 64, grad=False)
    x[0, 1] = 0
    x[0, 2, 5] = torch.nan
    x[0, 3, 63] = torch.inf
    rows = ops.norm_modulate_quantize(x, weight, scale, EPS, to)
    finite = decoded(rows).isfinite().all(-1)[0]
    assert finite.tolist() == [True, True, False, False] and (decoded(rows)[0, 1] == 0).all()
    scale[..., 7] = torch.nan
    assert decoded(ops.norm_modulate_quantize(x[:, :1], weight, scale, EPS, to)).isnan().any()
    for shape in ((0, 4, 8), (2, 0, 8)):
        empty = ops.norm_modulate_quantize(torch.empty(shape), torch.ones(8), torch.zeros(1, 1, 8), EPS, to)
        assert empty.values.shape == shape and empty.scale.shape == (*shape[:2], 1)
    mixed = ops.norm_modulate_quantize(x[:, :1].bfloat16(), weight, torch.zeros(1, 1, 64), EPS, to)
    assert mixed.dtype == torch.float32 and mixed.values.dtype == to


def test_norm_to_8_bits_takes_no_gradient_and_no_other_dtype():
    x, weight, scale = normal(2, 3, 8), normal(8, seed=1), normal(2, 1, 8, seed=2)
    assert not ops.norm_modulate_quantize(x, weight, scale, EPS, torch.int8).scale.requires_grad
    op = torch.ops.l2p_fast.norm_modulate_quantize
    for to in EIGHT_BITS:
        opcheck(op.default, (x.detach(), weight.detach(), scale.detach(), EPS, to))
    if ops.extension_status().startswith("loaded"):
        with pytest.raises(RuntimeError, match="int8 or float8_e4m3fn"):
            op(x.detach(), weight.detach(), scale.detach(), EPS, torch.bfloat16)


def test_sums_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    (_, (fused, _, args)) = next(iter(block_inputs((2, 300, 1024), steps=("norm_modulate",)).items()))
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(result_and_gradients(fused, args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_extreme_values():
    x = torch.tensor([-200.0, -90.0, -87.5, -20.0, -0.0, 1e-30, 20.0, 90.0, 200.0, float("nan")])
    torch.testing.assert_close(
        ops.silu_mul(x, torch.ones(10)),
        ops.silu_mul_reference(x, torch.ones(10)),
        equal_nan=True,
        rtol=1e-6,
        atol=1e-30,
    )
    big = torch.full((1, 1, 8), 3e38, dtype=torch.bfloat16)  # the square is beyond fp32
    args = (big, torch.ones(8), torch.zeros(1, 1, 8, dtype=torch.bfloat16), EPS)
    torch.testing.assert_close(ops.norm_modulate(*args), ops.norm_modulate_reference(*args), equal_nan=True)
    args = (0 * big, *args[1:])
    assert (ops.norm_modulate(*args) == 0).all()


def test_mixed_dtypes_are_promoted_as_pytorch_does():
    x, weight, scale = normal(1, 3, 8, dtype=torch.bfloat16), normal(8), normal(1, 1, 8)
    for fused, reference, args in (
        (ops.norm_modulate, ops.norm_modulate_reference, (x, weight, scale, EPS)),
        (ops.gate_norm_residual, ops.gate_norm_residual_reference, (normal(1, 3, 8), x, weight, scale, EPS)),
        (ops.silu_mul, ops.silu_mul_reference, (x, scale)),
    ):
        assert torch.equal(fused(*args), reference(*args)) and fused(*args).dtype == torch.float32
    # a weight kept in fp32 beside bfloat16 values, as a trainer keeps it
    scale = scale.detach().bfloat16()
    out = ops.norm_modulate(x, weight, scale, EPS)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


def test_rms_norm_module_takes_the_fused_steps():
    norm = RMSNorm(16, EPS)
    x, residual, given = normal(2, 3, 16), normal(2, 3, 16, seed=1), normal(2, 1, 16, seed=2)
    assert torch.equal(norm(x, scale=given), ops.norm_modulate(x, norm.weight, given, EPS))
    want = ops.gate_norm_residual(residual, x, norm.weight, given, EPS)
    assert torch.equal(norm(x, residual=residual, gate=given), want)
    angles = normal(1, 3, 1, 8, grad=False)
    heads, rope = normal(2, 3, 2, 16), (angles.cos(), angles.sin())
    assert torch.equal(norm(heads, rope=rope), ops.qk_norm_rope(heads, norm.weight, rope, EPS))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(dtype):
    library = torch.ops.l2p_fast
    x, weight, given = (
        normal(2, 3, 8, dtype=dtype),
        normal(8, dtype=dtype, seed=1),
        normal(2, 1, 8, dtype=dtype, seed=2),
    )
    grad = normal(2, 3, 8, dtype=dtype, seed=3, grad=False)
    plain = [t.detach() for t in (x, weight, given)]
    opcheck(library.norm_modulate.default, (x, weight, given, EPS))
    opcheck(library.gate_norm_residual.default, (normal(2, 3, 8, dtype=dtype, seed=4), x, weight, given, EPS))
    opcheck(library.norm_modulate_backward.default, (grad, *plain, EPS))
    opcheck(library.gate_norm_backward.default, (grad, *plain, EPS))
    angles = normal(1, 3, 1, 4, grad=False)
    heads = normal(2, 3, 2, 8, dtype=dtype)
    opcheck(library.qk_norm_rope.default, (heads, weight, angles.cos(), angles.sin(), EPS))
    turned = (heads.detach().clone(), heads.detach(), weight.detach(), angles.cos(), angles.sin(), EPS)
    opcheck(library.qk_norm_rope_backward.default, turned)
    opcheck(library.silu_mul.default, (x, normal(2, 3, 8, dtype=dtype, seed=5)))
    opcheck(library.silu_mul_backward.default, (grad, plain[0], plain[0]))


def test_gradcheck():
    x, weight, given = (t.double().detach().requires_grad_() for t in (normal(2, 3, 6), normal(6), normal(2, 1, 6)))
    check = torch.autograd.gradcheck
    assert check(lambda *a: ops.norm_modulate(*a, EPS), (x, weight, given))
    assert check(lambda *a: ops.gate_norm_residual(*a, EPS), (normal(2, 3, 6, dtype=torch.float64), x, weight, given))
    angles = normal(1, 2, 1, 3, grad=False)
    heads = normal(2, 2, 2, 6, dtype=torch.float64)
    assert check(lambda x, w: ops.qk_norm_rope(x, w, (angles.cos(), angles.sin()), EPS), (heads, weight))
    assert check(ops.silu_mul, (x, normal(2, 3, 6, dtype=torch.float64)))


def test_the_ops_themselves_never_read_past_their_inputs():
    if not ops.extension_status().startswith("loaded"):
        pytest.skip(ops.extension_status())
    library, x = torch.ops.l2p_fast, torch.zeros(2, 3, 8)
    for weight, scale, message in (
        (torch.zeros(7), torch.zeros(2, 1, 8), "weight must be as wide"),
        (torch.zeros(8), torch.zeros(2, 1, 7), "as wide as x"),
        (torch.zeros(8), torch.zeros(2, 2, 8), "must be"),
        (torch.zeros(8), torch.zeros(3, 1, 8), "must be"),
        (torch.zeros(8), torch.zeros(2, 1, 8).double(), "dtype of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.norm_modulate(x, weight, scale, EPS)
    with pytest.raises(RuntimeError, match="shape of x"):
        library.gate_norm_residual(x[:, :2], x, torch.zeros(8), torch.zeros(2, 1, 8), EPS)
    with pytest.raises(RuntimeError, match="cos must be"):
        library.qk_norm_rope(x[:, :, None], torch.zeros(8), torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4), EPS)
    with pytest.raises(RuntimeError, match="shape of x"):
        library.silu_mul(x, x[:1])


def test_works_without_the_extension():
    """The same tests on the plain form: of values, gradients and shapes."""
    if os.environ.get("L2P_EXTENSION") == "0":
        pytest.skip("this run is without it")
    names = "equals_reference or shared or gradcheck or empty or 8_bits"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names],
        capture_output=True,
        text=True,
        env={**os.environ, "L2P_EXTENSION": "0"},
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_cuda_equals_cpu(dtype):
    if "CUDA" not in ops.extension_status():
        pytest.skip(ops.extension_status())
    tolerance = EXACT.get(dtype, dict(rtol=0.03, atol=0.03))

    def on_gpu(value):
        if isinstance(value, tuple):
            return tuple(map(on_gpu, value))
        return value.detach().cuda().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value

    for name, (fused, _, args) in every_step(dtype):
        first, second = (result_and_gradients(fused, [on_gpu(a) for a in args]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name
        agree([t.cpu() for t in first], result_and_gradients(fused, args), (name, args[0].shape), **tolerance)
