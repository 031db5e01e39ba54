"""The choice of an attention backend, without a GPU: what is measured is stood in for."""

import pytest
import torch

from l2p_fast import attention
from l2p_fast.errors import UserError

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
