"""Attention over 4096 image tokens and text by every installed backend, and over a ragged batch of two such rows,
as guidance makes them: `pytest benchmarks/test_attention.py`. Heads of width 128, as many as the scale's models have.

Ours: the backend that ``--attention auto`` takes. Plain: scaled_dot_product_attention, row by row. Backends that have a
kernel for packed rows are measured with it on the ragged batch.
"""

from __future__ import annotations

import pytest
import torch

from l2p_fast.models import attention

from . import counts
from .conftest import CLOCK
from .measure import Case, NotHere, Scale, error

pytestmark = pytest.mark.benchmark(timer=CLOCK)
BACKENDS = [name for name in attention.BACKENDS if name != "auto" and attention.available(name)]
PACKING = [name for name in BACKENDS if attention.BACKENDS[name].packed]
ROUNDING = {"sage", "sage_hub"}


@torch.no_grad()
def build(variant: str, scale: Scale, device: str, ragged: bool = False) -> Case:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    heads, tokens = scale.heads(scale.dim), counts.padded(scale.grid**2)
    lengths = [tokens + scale.text_tokens] + [tokens + counts.SEQUENCE_MULTIPLE] * ragged
    shape = sum(lengths), heads, scale.dim // heads
    query, key, value = (torch.randn(shape, device=device, dtype=scale.torch_dtype) for _ in range(3))
    rows = attention.Ragged.of(lengths, device)
    row = query[None, : lengths[0]]
    backend = variant
    if variant == "ours":
        backend, _ = attention.fastest(row.shape, row.dtype, row.device, biased=False)

    def plain() -> torch.Tensor:
        return attention.packed_attention_reference(query, key, value, rows)

    def one_by_one() -> torch.Tensor:
        alone = zip(*(x[None].split(lengths, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([dispatch_attention_fn(*row)[0] for row in alone])

    packed = attention.packed_kernel(row, backend) if ragged and variant != "plain" else None
    if ragged and packed is None and variant in PACKING:
        raise NotHere(f"{backend} attends such rows one by one here")

    def by_backend() -> torch.Tensor:
        try:
            with attention.use(backend):
                return one_by_one() if packed is None else packed(query, key, value, rows)
        except Exception as problem:  # kernels decline a card, dtype or shape each in their own way
            raise NotHere(f"{backend} can't: {problem}") from problem

    run = {"plain": plain, "plain compiled": torch.compile(plain)}.get(variant, by_backend)
    return Case(
        run=run,
        work=counts.Work(sum(counts.attention(n, scale.dim) for n in lengths)) + counts.moved(shape) * 4,
        check=lambda: error(run(), plain()),
        tolerance=0.1 if backend in ROUNDING else 0.01,
        against="the plain form in the same dtype",
        facts={"width": scale.dim, "heads": heads, "backend": backend, "packed": packed is not None},
    )


@pytest.mark.parametrize("variant", ("ours", "plain", *BACKENDS, "plain compiled"))
def test_attention(row, scale, variant):
    row(build, "op", f"attention, heads: {scale.heads(scale.dim)}", scale.grid * 64, variant)


@pytest.mark.parametrize("variant", ("ours", "plain", *PACKING))
def test_ragged_attention(row, scale, variant):
    row(build, "op", f"ragged attention, heads: {scale.heads(scale.dim)}", scale.grid * 64, variant, ragged=True)
