"""Weights of 8 and 4 bits: the products against their plain form, the size, the error that is reported."""

import pytest
import torch
from tiny_pipeline import tiny_transformer, wide_transformer
from torch import nn

from l2p_fast.errors import UserError
from l2p_fast.models.adapters import AdapterLayer
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.ops import QuantizedRows, quantize_rows
from l2p_fast.quantize import products
from l2p_fast.quantize.products import (
    DTYPES,
    LowBitLinear,
    decode,
    encode,
    lowbit_linear,
    lowbit_linear_reference,
    quantize,
    quantize_block,
)

ERROR = {"fp8": 0.05, "int8": 0.02, "nf4": 0.15}  # of a product of normal numbers: mantissa, range, quantiles


@pytest.mark.parametrize("name", DTYPES)
def test_products(name):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 64, dtype=torch.bfloat16), torch.randn(48, 64)
    weight[3] *= 1e-3  # a row of its own scale
    rounded, scale = encode(weight, DTYPES[name])
    assert rounded.dtype == DTYPES[name] and scale.shape == (48, 1)
    assert rounded.shape == (48, 32 if name == "nf4" else 64)
    exact = x.float() @ weight.t()
    for product in (lowbit_linear, lowbit_linear_reference):
        out = product(x, rounded, scale)
        assert out.dtype == x.dtype and out.shape == (2, 32, 48)
        error = (out.float() - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
        assert error.max() < ERROR[name], (name, product)
    near = lowbit_linear(x, rounded, scale).float() - lowbit_linear_reference(x, rounded, scale).float()
    assert near.norm() / exact.norm() < 4e-3  # bf16 results


@pytest.mark.parametrize("name", ("fp8", "int8"))
def test_rows_rounded_beforehand(name):
    x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, scale = encode(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)), DTYPES[name])
    for product in (lowbit_linear, lowbit_linear_reference):
        assert torch.equal(product(quantize_rows(x, DTYPES[name]), weight, scale), product(x, weight, scale))


@pytest.mark.parametrize("name", ("fp8", "int8"))
@torch.no_grad()
def test_layers_that_read_alike_share_one_rounding(name, monkeypatch):
    """Queries, keys and values get one, w1 and w3 another, by the norm before them; and the block computes the same."""
    block = wide_transformer().layers[0].to(torch.bfloat16)
    quantize_block(block, name)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 192, generator=random).bfloat16()
    given = torch.randn(2, 4 * 192, generator=random).bfloat16() / 4
    angles = torch.randn(1, 32, 1, 16, generator=random)
    rope = angles.cos(), angles.sin()
    read, seen = products.lowbit_linear, []
    monkeypatch.setattr(products, "lowbit_linear", lambda x, *rest: (seen.append(x), read(x, *rest))[1])
    shared = block(x, rope, modulation=given)
    q, k, v, out, w1, w3, w2 = seen
    assert all(isinstance(rows, QuantizedRows) and rows.values.dtype == DTYPES[name] for rows in (q, w1))
    assert q is k is v and w1 is w3 and not any(isinstance(x, QuantizedRows) for x in (out, w2))
    monkeypatch.setattr(LowBitLinear, "row_dtype", None)
    seen.clear()
    apart = block(x, rope, modulation=given)
    assert not any(isinstance(x, QuantizedRows) for x in seen)
    # an input that is rounded to bfloat16 first may be a step of 8 bits further; so are a few
    assert (shared.float() - apart.float()).norm() <= 0.02 * apart.float().norm()


@torch.no_grad()
def test_layers_that_do_not_read_alike_share_nothing():
    block = wide_transformer().layers[0]
    assert block.attention.rows is None and block.feed_forward.rows is None
    quantize_block(block, "int8")
    assert block.attention.rows == block.feed_forward.rows == torch.int8
    block.attention.to_k = nn.Linear(192, 192, bias=False)
    add = AdapterLayer(block.feed_forward.w3)  # reads values
    block.feed_forward.w3 = add
    assert block.attention.rows is None and block.feed_forward.rows is None
    block = wide_transformer().layers[0]
    quantize_block(block, "nf4")
    assert block.attention.rows is None
    block = wide_transformer().layers[0]
    quantize_block(block, "int8", rounds_inputs=False)
    assert block.attention.rows is None


def test_zero_rows_stay_zero():
    for dtype in DTYPES.values():
        rounded, scale = encode(torch.zeros(16, 64), dtype)
        assert lowbit_linear(torch.ones(32, 64), rounded, scale).eq(0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_4_bits_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, scale = encode(weight, torch.uint8)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(values.flatten(), theirs.flatten()) and torch.equal(scale.flatten(), state.absmax)
    assert torch.equal(decode(values, scale, dtype), functional.dequantize_4bit(theirs, state))


def test_an_adapter_learns_over_4_bits():
    """The product is differentiable in its input."""
    rounded, scale = encode(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.uint8)
    x = torch.ones(3, 64, requires_grad=True)
    lowbit_linear(x, rounded, scale).sum().backward()
    assert torch.allclose(x.grad, decode(rounded, scale, torch.float32).sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("name", DTYPES)
def test_model(name):
    model = wide_transformer().to(torch.bfloat16)
    weight = model.layers[0].attention.to_q.weight.clone()
    error = quantize(model, name)
    assert 0 < error < (0.3 if name == "nf4" else 0.1)
    layer = model.layers[0].attention.to_q
    assert isinstance(layer, LowBitLinear) and layer.weight.element_size() == 1
    assert (layer.weight_in(torch.float32) - weight.float()).norm() / weight.float().norm() < ERROR[name]
    untouched = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert untouched and all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize(("name", "multiple"), [("int8", 16), ("nf4", 64)])
def test_a_model_whose_sizes_do_not_fit(name, multiple):
    model = L2PTransformer2DModel(dim=40, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=8,
                                  axes_dims=(8, 16, 16), head_width=0.05)  # fmt: skip
    with pytest.raises(UserError, match=f"multiples of {multiple}"):
        quantize(model, name)


def test_unknown_name():
    with pytest.raises(UserError, match="choose from fp8, int8, nf4"):
        quantize(tiny_transformer(), "fp4")
