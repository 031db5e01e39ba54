"""The Detailer Head's ops: composed convolutions are the plain ones, and every kernel is the reference."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

from l2p_fast import ops
from l2p_fast.ops import head as head_ops
from l2p_fast.ops.head import (
    decoder_weights,
    encoder_weights,
    head_decode_reference,
    head_encode_reference,
    pack,
    unpack,
)
from tests.far import far

# (Ci, Cs, channels of up, Co, H, W, last level): the smallest, odd widths, more than one tile, a 3-channel skip, more
# outputs of the last level than one block makes.
LEVELS = (
    (4, 4, 4, 4, 2, 2, False),
    (6, 4, 8, 4, 4, 6, False),
    (16, 16, 16, 16, 8, 20, True),
    (8, 3, 4, 12, 22, 70, True),
    (40, 32, 32, 24, 6, 106, False),
    (20, 4, 8, 6, 12, 196, False),
    (8, 8, 4, 24, 20, 34, True),
)
ENCODERS = ((3, 16, 8, 20), (4, 4, 2, 70), (3, 3, 20, 34), (16, 40, 6, 106), (3, 8, 4, 2))
CPU = [
    pytest.param(which, dtype, id=f"{which}-{str(dtype).removeprefix('torch.')}")
    for which in ("cpu", "avx2")
    for dtype in (torch.bfloat16, torch.float32)
]


def level(ci, cs, cu, co, height, width, last, dtype):
    """Convolutions, inputs (B, C, H, W) and the plain result in fp64 (of values that are exact in ``dtype``)."""
    torch.manual_seed(ci)
    up, dec = nn.Conv2d(ci, cu, 3, padding=1), nn.Conv2d(cu + cs, co, 3, padding=1)
    out = nn.Conv2d(co, 3, 1) if last else None
    x, skip = torch.randn(2, ci, height // 2, width // 2).to(dtype), torch.randn(2, cs, height, width).to(dtype)
    for conv in filter(None, (up, dec, out)):
        conv.requires_grad_(False).to(dtype).double()
    plain = torch.cat([up(F.interpolate(x.double(), scale_factor=2)), skip.double()], 1)
    plain = F.silu(dec(plain))
    plain = out(plain) if last else plain
    for conv in filter(None, (up, dec, out)):
        conv.to(dtype)
    return (up, dec, out), x, skip, plain


def rows_first(x):
    """(B, C, H, W) -> dense (B, H, W, C), C even."""
    return F.pad(x.permute(0, 2, 3, 1), (0, x.shape[1] % 2)).contiguous()


def decode(run, weights, x, skip, start, stop, height):
    """`head_decode` by ``run``, given only the rows that it may read."""
    first, last = max(start // 2 - 1, 0), min((stop + 1) // 2 + 1, height // 2)
    upper, lower = max(start - 1, 0), min(stop + 1, height)
    out = run(x[:, first:last], skip[:, upper:lower], *weights, first, upper, start, stop, height)
    return out if weights.out_weight is not None else out.permute(0, 3, 1, 2)


def bands(height):
    some = {(0, height), (0, height // 2), (height // 2, height), (1, height), (height // 2 - 1, height - 1)}
    return sorted((start, stop) for start, stop in some if start < stop)


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.fixture
def kernel(monkeypatch):
    """A compiled op: this processor's own, or that for AVX2."""

    def choose(op, which):
        if not ops.extension_status().startswith("loaded"):
            pytest.skip(ops.extension_status())
        if not head_ops.fused_levels(torch.device("cpu"), torch.bfloat16):
            pytest.skip("no kernels for this processor")
        if which == "avx2":
            monkeypatch.setenv("L2P_CPU", "avx2")  # read at every call
        return getattr(torch.ops.l2p_fast, op)

    return choose


def test_packing():
    weight = torch.arange(2 * 12 * 7 * 9.0).reshape(2, 12, 7, 3, 3).half()
    packed = pack(weight)
    assert packed.shape == (2, 2, 3, 3, 4, 8, 2)
    assert packed[1, 1, 2, 0, 2, 3, 1] == weight[1, 8 + 3, 2 * 2 + 1, 2, 0]
    assert torch.equal(unpack(packed, 12, 7), weight)
    packed = pack(weight.float())
    assert packed.shape == (2, 2, 4, 3, 8, 8, 1)
    assert packed[1, 1, 3, 0, 5, 3, 0] == weight[1, 8 + 3, 5, 2, 0]
    assert packed[1, 1, 1, 0, 5, 3, 0] == weight[1, 8 + 3, 5, :, 0].float().sum() / 2
    assert torch.equal(unpack(packed, 12, 7), weight.float())
    column = weight[..., 1:2].float()  # as edge_weight: too little for Winograd
    assert pack(column).shape == (2, 2, 3, 1, 8, 8, 1) and torch.equal(unpack(pack(column), 12, 7), column)


@pytest.mark.parametrize("sizes", LEVELS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_composed_is_plain(sizes, dtype, tolerance):
    convs, x, skip, plain = level(*sizes, dtype)
    weights = decoder_weights(*convs)
    for start, stop in bands(sizes[4]):
        out = decode(head_decode_reference, weights, rows_first(x), rows_first(skip), start, stop, sizes[4])
        assert error(out, plain[:, :, start:stop]) <= tolerance


@pytest.mark.parametrize("which", ["cpu", "avx2"])
@pytest.mark.parametrize("sizes", LEVELS)
def test_decode(kernel, sizes, which):
    run = kernel("head_decode", which)
    convs, x, skip, plain = level(*sizes, torch.bfloat16)
    weights = decoder_weights(*convs)
    for start, stop in bands(sizes[4]):
        inputs = weights, rows_first(x), rows_first(skip), start, stop, sizes[4]
        out, reference = decode(run, *inputs), decode(head_decode_reference, *inputs)
        assert out.shape == reference.shape and out.dtype == torch.bfloat16
        assert error(out, reference.double()) <= 2e-3  # now and then the next bfloat16
        assert (out - reference).abs().max() <= 2e-2 * reference.abs().max()  # first and last column, too
        assert error(out, plain[:, :, start:stop]) <= 4e-3


@pytest.mark.parametrize("which", ["cpu", "avx2"])
def test_decode_of_more_weights_than_shared_memory_holds(kernel, which):
    convs, x, skip, _ = level(120, 104, 4, 8, 2, 34, False, torch.bfloat16)
    inputs = decoder_weights(*convs), rows_first(x), rows_first(skip), 0, 2, 2
    out, reference = decode(kernel("head_decode", which), *inputs), decode(head_decode_reference, *inputs)
    assert error(out, reference.double()) <= 2e-3


@pytest.mark.parametrize("which", ["cpu", "avx2"])
@pytest.mark.parametrize("sizes", [*LEVELS, (72, 200, 20, 20, 4, 34, False)])  # more inputs than the first cache holds
def test_decode_in_float32(kernel, sizes, which):
    run = kernel("head_decode", which)
    convs, x, skip, plain = level(*sizes, torch.float32)
    weights = decoder_weights(*convs)
    for start, stop in bands(sizes[4]):
        out = decode(run, weights, rows_first(x), rows_first(skip), start, stop, sizes[4])
        wanted = plain[:, :, start:stop]
        assert out.dtype == torch.float32 and error(out, wanted) <= 2e-6
        assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # first and last column, too


@pytest.mark.parametrize("which,dtype", CPU)
@pytest.mark.parametrize("ci,co,height,width", ENCODERS)
def test_encode(kernel, ci, co, height, width, which, dtype):
    run = kernel("head_encode", which)
    torch.manual_seed(ci)
    conv = nn.Conv2d(ci, co, 3, padding=1).requires_grad_(False).to(dtype)
    near = {"rtol": 2**-7, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    weights, pixels = encoder_weights(conv), torch.randn(2, ci, height, width)
    dense = pixels.permute(0, 2, 3, 1)
    views = [dense, dense.bfloat16(), dense.bfloat16().contiguous(), dense.transpose(1, 2).contiguous().transpose(1, 2)]
    for start, stop in sorted({(0, height), (height - 2, height), (0, 2), (height // 4 * 2, height)}):
        first = max(start - 1, 0)
        for x in views:
            inputs = x[:, first : stop + 1], *weights, first, start, stop, height, True, True
            for out, wanted in zip(run(*inputs), head_encode_reference(*inputs), strict=True):
                assert out.shape == wanted.shape and out.is_contiguous()
                torch.testing.assert_close(out, wanted, **near)
    odd = dense, *weights, 0, 1, height, height, True, False
    torch.testing.assert_close(run(*odd)[0], head_encode_reference(*odd)[0], **near)
    kept, pooled = run(dense, *weights, 0, 0, height, height, False, True)
    assert kept.shape[1] == 0 and pooled.shape[1] == height // 2


@pytest.mark.parametrize("which,dtype", CPU)
def test_silu_of_extremes(kernel, which, dtype):
    run = kernel("head_encode", which)
    conv = nn.Conv2d(2, 2, 1).requires_grad_(False).to(dtype)
    conv.weight.copy_(torch.eye(2)[:, :, None, None]), conv.bias.zero_()
    weights = encoder_weights(conv)._replace(weight=pack(F.pad(conv.weight, (1, 1, 1, 1))))
    values = torch.tensor([0.0, -1e-3, 1.0, -1.0, 20.0, -20.0, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30]).to(dtype)
    x = values.reshape(1, 1, 6, 2).repeat(1, 2, 1, 1)
    out, _ = run(x, *weights, 0, 0, 2, 2, True, False)
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out, F.silu(x.double()).to(dtype), rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("which,dtype", CPU)
def test_the_pool_keeps_what_is_not_a_number(kernel, which, dtype):
    run = kernel("head_encode", which)
    conv = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False).to(dtype)
    x = torch.randn(1, 8, 80, 2).to(dtype)
    x[0, 3, 6, 0] = x[0, 4, 43, 1] = float("nan")  # makes 3 x 3 of them, so all sorts of windows
    inputs = x, *encoder_weights(conv), 0, 0, 8, 8, False, True
    pooled, wanted = run(*inputs)[1], head_encode_reference(*inputs)[1]
    assert wanted.isnan().any() and torch.equal(pooled.isnan(), wanted.isnan())


@pytest.mark.parametrize("which", ["cpu", "avx2"])
def test_offsets_beyond_32_bits(kernel, which):
    convs, x, skip, _ = level(4, 4, 4, 4, 4, 6, True, torch.bfloat16)
    x, skip = rows_first(x), rows_first(skip)
    inputs = *decoder_weights(*convs), 0, 0, 0, 4, 4
    run = kernel("head_decode", which)
    assert torch.equal(run(far(x), far(skip), *inputs), run(x, skip, *inputs))
    inputs = *encoder_weights(convs[0]), 0, 0, 4, 4, True, True
    run = kernel("head_encode", which)
    for a, b in zip(run(far(skip), *inputs), run(skip, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which,dtype", CPU)
def test_many_rows_and_threads(kernel, which, dtype):
    run = kernel("head_decode", which)
    convs, x, skip, plain = level(4, 4, 4, 4, 64, 32, False, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        out = decode(run, decoder_weights(*convs), rows_first(x), rows_first(skip), 0, 64, 64)
    finally:
        torch.set_num_threads(threads)
    assert error(out, plain) <= 4e-3


def test_opcheck():
    convs, x, skip, _ = level(4, 4, 4, 4, 4, 6, True, torch.bfloat16)
    skip = rows_first(skip)
    opcheck(
        torch.ops.l2p_fast.head_decode,
        (rows_first(x), skip.clone().requires_grad_(), *decoder_weights(*convs), 0, 0, 0, 4, 4),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    opcheck(torch.ops.l2p_fast.head_encode, (skip.float(), *encoder_weights(convs[0]), 0, 0, 4, 4, True, True))


def test_gradients():
    convs, x, skip, _ = level(4, 4, 4, 4, 4, 6, True, torch.float64)
    weights = decoder_weights(*convs)
    backward = head_ops._backward_of(head_decode_reference)
    x, skip = rows_first(x).requires_grad_(), rows_first(skip).requires_grad_()
    inputs = x, skip, *weights, 0, 0, 0, 4, 4
    out = head_decode_reference(*inputs)
    grad = torch.randn_like(out)
    ctx = SimpleNamespace(save_for_backward=lambda *tensors: setattr(ctx, "saved_tensors", tensors))
    head_ops._setup(ctx, inputs, out)
    ctx.needs_input_grad = [isinstance(i, torch.Tensor) and i.requires_grad for i in inputs]
    for got, wanted in zip(backward(ctx, grad)[:2], torch.autograd.grad(out, (x, skip), grad), strict=True):
        assert torch.equal(got, wanted)


def test_a_kernel_that_disagrees_is_declined(monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.l2p_fast, "head_decode", lambda *args: head_decode_reference(*args) + 1)
    assert "they differ from the reference by" in head_ops._disagreement.__wrapped__("cpu")
    assert "not used on cpu: they differ" in caplog.text
    monkeypatch.setattr(torch.ops.l2p_fast, "head_decode", lambda *args: head_decode_reference(*args) * torch.nan)
    assert "by nan" in head_ops._disagreement.__wrapped__("cpu")


def test_a_kernel_that_agrees_is_taken():
    assert head_ops._disagreement.__wrapped__("cpu") is None


def test_a_gpu_without_a_matching_image_falls_back(monkeypatch, caplog):
    def launch(*args):
        raise RuntimeError("head: CUDA launch failed: no kernel image is available for execution on the device\nat ...")

    monkeypatch.setattr(torch.ops.l2p_fast, "head_encode", launch)
    why = head_ops._disagreement.__wrapped__("cpu")
    assert why == "head: CUDA launch failed: no kernel image is available for execution on the device"
    assert caplog.text.count("not used on cpu") == 1


def test_too_little_memory_for_the_comparison_says_nothing_of_the_kernels(monkeypatch):
    def launch(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.ops.l2p_fast, "head_encode", launch)
    with pytest.raises(torch.OutOfMemoryError):
        head_ops._disagreement("cpu")  # nor is it remembered
    monkeypatch.undo()
    assert head_ops._disagreement("cpu") is None


def test_cuda_kernels_run_by_default(monkeypatch):
    found = {"cuda:0": None, "cuda:1": "they differ"}
    monkeypatch.setattr(head_ops, "_disagreement", found.get)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *args: True)
    monkeypatch.delenv("L2P_CUDA_HEAD", raising=False)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert head_ops.fused_levels(first, torch.bfloat16) and not head_ops.fused_levels(second, torch.bfloat16)
    assert head_ops.head_obstacle(second, torch.bfloat16) == "they differ"
    assert head_ops.head_obstacle(first, torch.float32) == "there are none for cuda in float32"
    monkeypatch.setenv("L2P_CUDA_HEAD", "0")
    assert head_ops.head_obstacle(first, torch.bfloat16) == "switched off by L2P_CUDA_HEAD=0"
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *args: False)
    assert head_ops.head_obstacle(first, torch.bfloat16) == "none for cuda were loaded"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sizes", LEVELS)
def test_cuda_is_reference(sizes):
    if "CUDA" not in ops.extension_status():
        pytest.skip(ops.extension_status())
    convs, x, skip, _ = level(*sizes, torch.bfloat16)
    weights = decoder_weights(*convs)
    on_gpu = type(weights)(*(w.cuda() if isinstance(w, torch.Tensor) else w for w in weights))
    for start, stop in bands(sizes[4]):
        reference = decode(head_decode_reference, weights, rows_first(x), rows_first(skip), start, stop, sizes[4])
        rows = rows_first(x).cuda(), rows_first(skip).cuda(), start, stop, sizes[4]
        out = decode(torch.ops.l2p_fast.head_decode, on_gpu, *rows).cpu()
        assert error(out, reference.double()) <= 2e-3
