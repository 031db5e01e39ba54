"""The choice of an attention backend, without a GPU: what is measured is stood in for."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention import SDPBackend

from l2p_fast.errors import UserError
from l2p_fast.models import attention, blocks
from l2p_fast.models.blocks import Attention, Keys

SHAPE = (1, 64, 2, 16)


def pick(monkeypatch, times: dict[str, float | Exception], biased: bool = False) -> tuple[str, str]:
    def measure(name, shape, dtype, device):
        assert (shape, dtype, device) == (SHAPE, torch.bfloat16, torch.device("cuda"))
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setattr(attention, "measure", measure)
    monkeypatch.setattr(attention, "available", lambda name: name in times)
    return attention.fastest(SHAPE, torch.bfloat16, torch.device("cuda"), biased)


def test_the_fastest_that_runs(monkeypatch):
    times = {"native": 2.0, "flash": 1.0, "_native_cudnn": RuntimeError("no such card\nand more"), "xformers": 1.5}
    name, why = pick(monkeypatch, times)
    assert name == "flash"
    assert why == "flash 1 ms, xformers 1.5 ms, native 2 ms, _native_cudnn can't: no such card"
    assert pick(monkeypatch, times, biased=True)[0] == "xformers"  # flash takes no bias


def test_none_runs(monkeypatch):
    with pytest.raises(UserError, match="no attention backend runs on cuda.*native can't: broken"):
        pick(monkeypatch, {"native": RuntimeError("broken")})


def test_on_a_cpu_there_is_one():
    assert attention.fastest(SHAPE, torch.float32, torch.device("cpu"), False)[0] == "native"


def test_named_ones_are_checked():
    attention.check("native", biased=True)
    with pytest.raises(UserError, match="needs the package flash_attn: pip install flash-attn"):
        attention.check("flash", biased=False)


def test_a_backend_that_cant_weigh_keys(monkeypatch):
    monkeypatch.setattr(attention, "available", lambda name: True)
    with pytest.raises(UserError, match="can't weigh keys.*choose from auto, native"):
        attention.check("flash", biased=True)


# --- Packed rows -----------------------------------------------------------------------------------------------------
LENGTHS = (5, 1, 8)
ROWS = attention.Ragged.of(LENGTHS, "cpu")


def padded(seed: int = 0) -> torch.Tensor:
    """(3, 8, 2, 16), of whose rows only `LENGTHS` count."""
    return torch.randn(3, 8, 2, 16, generator=torch.Generator().manual_seed(seed))


def packed() -> list[torch.Tensor]:
    return [attention.pack(padded(i), LENGTHS) for i in range(3)]


def test_packing():
    rows = attention.pack(padded(), LENGTHS).split(LENGTHS)
    assert all(row.equal(padded()[i, :n]) for i, (row, n) in enumerate(zip(rows, LENGTHS, strict=True)))


def test_the_reference_is_each_row_alone():
    out = attention.packed_attention_reference(*packed(), ROWS)
    assert out.shape == (14, 2, 16)
    for row, *given in zip(out.split(LENGTHS), *(x.split(LENGTHS) for x in packed()), strict=True):
        q, k, v = (x.double().transpose(0, 1) for x in given)
        exact = torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v
        assert (row.transpose(0, 1) - exact).abs().max() < 1e-6


def flash(query, key, value, ends, key_ends, longest, longest_key):
    """FlashAttention's face over the reference: row boundaries, int32."""
    assert ends is key_ends and ends.dtype == torch.int32 and ends.tolist() == [0, 5, 6, 14]
    assert longest == longest_key == 8
    return attention.packed_attention_reference(query, key, value, ROWS)


@pytest.mark.parametrize("name,module", {"flash": "flash_attn", "_flash_3": "flash_attn_interface"}.items())
def test_row_boundaries(monkeypatch, name, module):
    exact = attention.packed_attention_reference(*packed(), ROWS)
    for function in (flash, lambda *given: (flash(*given), "log-sum")):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=function))
        assert attention.BACKENDS[name].packed(*packed(), ROWS).equal(exact)


def test_xformers_face(monkeypatch):
    def memory_efficient_attention(query, key, value, attn_bias):
        rows = (x[0] for x in (query, key, value))
        assert attn_bias == list(LENGTHS)
        return attention.packed_attention_reference(*rows, ROWS)[None]

    mask = SimpleNamespace(from_seqlens=lambda lengths, device: lengths)
    for module, content in {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": mask},
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**content))
    exact = attention.packed_attention_reference(*packed(), ROWS)
    assert attention.BACKENDS["xformers"].packed(*packed(), ROWS).equal(exact)


@pytest.mark.parametrize("name", ("native", "_native_flash"))
def test_torch_takes_the_call(name):
    """PyTorch's kernel needs a GPU; what it accepts and its backward's shapes can be seen without numbers."""
    given = [x.to("meta", torch.bfloat16).requires_grad_() for x in packed()]
    out = attention.BACKENDS[name].packed(*given, attention.Ragged.of(LENGTHS, "meta"))
    assert out.shape == (14, 2, 16) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in given)


def on_gpu(dtype: torch.dtype = torch.bfloat16, width: int = 16, device: str = "cuda") -> MagicMock:
    """What is asked of a query, without a GPU to have it on."""
    return MagicMock(device=torch.device(device), dtype=dtype, shape=(3, 8, 2, width))


def test_who_packs(monkeypatch):
    kernels = {name: backend.packed for name, backend in attention.BACKENDS.items()}
    for backend in ("flash", "xformers", "_native_flash", "sage", "_native_cudnn", "unheard of"):
        assert attention.packed_kernel(on_gpu(), backend) is kernels.get(backend)
    with attention_backend("_native_flash"):
        assert attention.packed_kernel(on_gpu()) is kernels["_native_flash"]
    for choice, kernel in ((SDPBackend.FLASH_ATTENTION, kernels["native"]), (SDPBackend.CUDNN_ATTENTION, None)):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *given, choice=choice: choice.value)
        assert attention.packed_kernel(on_gpu()) is kernel
    for other in (on_gpu(torch.float32), on_gpu(width=12), on_gpu(device="cpu")):
        assert attention.packed_kernel(other, "flash") is None


def test_how_ragged_batches_go(monkeypatch):
    given = SHAPE, torch.bfloat16, torch.device("meta")
    assert attention.ragged("flash", *given, biased=False) == "ragged batches row by row"
    monkeypatch.setattr(attention, "packed_kernel", lambda query, name: attention.BACKENDS[name].packed)
    assert attention.ragged("flash", *given, biased=False) == "ragged batches packed"
    assert attention.ragged("flash", *given, biased=True) == "ragged batches row by row"
    assert attention.ragged("sage", *given, biased=False) == "ragged batches row by row"


def test_packed_rows_equal_rows_alone(monkeypatch):
    """The same block with and without packing: exactly equal results and gradients."""
    torch.manual_seed(0)
    layer = Attention(32, 2, qk_norm=True, eps=1e-5)
    x = torch.randn(3, 8, 32)
    angles = torch.randn(1, 8, 1, 8)
    rope = angles.cos(), angles.sin()
    seen = []

    def kernel(*given):
        seen.append(given[-1])
        return attention.packed_attention_reference(*given)

    def run(keys: Keys, kernel=None) -> list[torch.Tensor]:
        monkeypatch.setattr(blocks, "packed_kernel", lambda query, backend: kernel)
        given = x.clone().requires_grad_()
        out = layer(given, rope, keys)
        layer.zero_grad()
        out.square().sum().backward()
        return [out, given.grad, *(p.grad.clone() for p in layer.parameters())]

    alone, together = run(Keys(ROWS)), run(Keys(ROWS), kernel)
    assert seen == [ROWS] and len(alone) == 8
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))
    for keys in (Keys(), Keys(ROWS, torch.zeros(1, 1, 1, 8))):  # equal lengths, and a bias, are not for it
        run(keys, kernel)
    assert seen == [ROWS]
