"""8-bit weights: the products against their plain form, the size, the error that is reported."""

import pytest
import torch
from tiny_pipeline import tiny_transformer
from torch import nn

from l2p_fast.errors import UserError
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.quantize.products import DTYPES, LowBitLinear, encode, lowbit_linear, lowbit_linear_reference, quantize

ERROR = {"fp8": 0.05, "int8": 0.02}  # of a product of normal numbers: 3 bits of mantissa, 7 bits of range


@pytest.mark.parametrize("name", DTYPES)
def test_products(name):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 64, dtype=torch.bfloat16), torch.randn(48, 64)
    weight[3] *= 1e-3  # a row of its own scale
    rounded, scale = encode(weight, DTYPES[name])
    assert rounded.dtype == DTYPES[name] and scale.shape == (48, 1)
    exact = x.float() @ weight.t()
    for product in (lowbit_linear, lowbit_linear_reference):
        out = product(x, rounded, scale)
        assert out.dtype == x.dtype and out.shape == (2, 32, 48)
        error = (out.float() - exact).norm(dim=(0, 1)) / exact.norm(dim=(0, 1))
        assert error.max() < ERROR[name], (name, product)
    near = lowbit_linear(x, rounded, scale).float() - lowbit_linear_reference(x, rounded, scale).float()
    assert near.norm() / exact.norm() < 4e-3  # bf16 results


def test_zero_rows_stay_zero():
    for dtype in DTYPES.values():
        rounded, scale = encode(torch.zeros(16, 16), dtype)
        assert lowbit_linear(torch.zeros(32, 16), rounded, scale).eq(0).all()


@pytest.mark.parametrize("name", DTYPES)
def test_model(name):
    model = tiny_transformer().to(torch.bfloat16)
    weight = model.layers[0].attention.to_q.weight.clone()
    error = quantize(model, name)
    assert 0 < error < 0.1
    layer = model.layers[0].attention.to_q
    assert isinstance(layer, LowBitLinear) and layer.weight.element_size() == 1
    assert (layer.weight.float() * layer.weight_scale - weight.float()).norm() / weight.float().norm() < ERROR[name]
    untouched = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert untouched and all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_model_whose_sizes_8_bits_do_not_take():
    model = L2PTransformer2DModel(dim=24, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=8,
                                  axes_dims=(8, 8, 8), head_width=0.05)  # fmt: skip
    with pytest.raises(UserError, match="multiples of 16"):
        quantize(model, "int8")


def test_unknown_name():
    with pytest.raises(UserError, match="choose from fp8, int8"):
        quantize(tiny_transformer(), "fp4")
