"""The transformer's body: what Z-Image's blocks compute, with the same parameter names.

B batch, N tokens, D model width, H heads, E = D / H head width, A = min(D, 256) width of the timestep embedding.

The four memory-bound steps of a block (norm and modulate, gated residual, query-key norm with RoPE, SiLU gate) are
fused ops, in `ops.norm` and `ops.silu`. Left out: what only latent or multi-image models need.
Source: Z-Image (arXiv 2511.22699); its public form is diffusers' ``ZImageTransformer2DModel``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..ops import (
    Linear,
    QuantizedRows,
    Rope,
    apply_rope,
    gate_norm_residual,
    norm_modulate,
    norm_modulate_quantize,
    product_dtype,
    qk_norm_rope,
    quantize_rows,
    rms_norm,
    silu_mul,
)
from .attention import Ragged, pack, packed_kernel

ADALN_DIM = 256  # the timestep embedding is never wider than this
SEQUENCE_MULTIPLE = 32  # each sequence is filled up to a multiple of this with a learned token


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, alone or with what follows it in a block.

    The step that follows runs inside this module's ``forward``, so that hooks on the module (offloading, casting) see
    every use of its weight.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self,
        x: Tensor,
        *,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        rope: Rope | None = None,
        rows: torch.dtype | None = None,
    ) -> Tensor | QuantizedRows:
        """norm(x); with ``scale`` modulated, with ``rope`` turned, with ``residual`` added to it, gated by ``gate``.

        With ``rows``, which goes with ``scale`` or alone, rounded row by row to that dtype of 8 bits.
        """
        if scale is not None and rows is not None:
            return norm_modulate_quantize(x, self.weight, scale, self.eps, rows)
        if scale is not None:
            return norm_modulate(x, self.weight, scale, self.eps)
        if rope is not None:
            return qk_norm_rope(x, self.weight, rope, self.eps)
        if residual is None:
            normed = rms_norm(x, self.weight, self.eps)
            return normed if rows is None else quantize_rows(normed, rows)
        if gate is None:
            return residual + rms_norm(x, self.weight, self.eps)
        return gate_norm_residual(residual, x, self.weight, gate, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rope_tables(positions: Tensor, axes_dims: tuple[int, ...], theta: float) -> Rope:
    """cos and sin for positions (..., N, axes), possibly fractional: each (..., N, 1, E / 2) fp32.

    Angles are computed in fp64 and rounded once; at integer positions they are those of Z-Image's precomputed tables.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[..., axis, None].double() * frequencies)
    angles = torch.cat(angles, dim=-1).float().unsqueeze(-2)
    return angles.cos(), angles.sin()


class Keys(NamedTuple):
    """Which keys attention sees, and how strongly.

    Attributes:
        rows: the tokens of each row of the batch, of which the longest has N; None: all have N.
        bias: (1, 1, 1, N) fp32 on the logits; None: none.
    """

    rows: Ragged | None = None
    bias: Tensor | None = None


ALL_KEYS = Keys()


def shared_rows(*layers: nn.Module) -> torch.dtype | None:
    """The dtype of the 8-bit rows (`ops.QuantizedRows`) that all of ``layers`` take in place of values; None: none."""
    found = {getattr(layer, "row_dtype", None) for layer in layers}
    return found.pop() if len(found) == 1 else None


class AttnProcessor:
    """Self-attention over (B, N, D) through diffusers' attention dispatcher.

    Rows of different lengths are attended each over its own tokens: nothing is computed for padding, the result does
    not depend on the neighbours, and no backend needs a mask (the fastest ones take none). Without a bias they are
    packed into one call where the backend has a kernel for that, else attended one by one.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Attention, x: Tensor | QuantizedRows, rope: Rope, keys: Keys = ALL_KEYS) -> Tensor:
        query, key, value = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query, rope=rope), attn.norm_k(key, rope=rope)
        else:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        dtype = value.dtype
        wide = dtype if torch.compiler.is_compiling() else product_dtype(dtype, value.device)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)

        def attend(row: slice, length: int) -> Tensor:
            return dispatch_attention_fn(
                *(part[row, :length] for part in (query, key, value)),
                attn_mask=None if keys.bias is None else keys.bias[..., :length].to(value.dtype),
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )

        if keys.rows is None:
            out = attend(slice(None), query.shape[1])
        else:
            plain = keys.bias is None and self._parallel_config is None
            packed = packed_kernel(query, self._attention_backend) if plain else None
            if packed is None:
                alone = [attend(slice(i, i + 1), length)[0] for i, length in enumerate(keys.rows.lengths)]
            else:
                parts = (pack(part, keys.rows.lengths) for part in (query, key, value))
                alone = packed(*parts, keys.rows).split(keys.rows.lengths)
            out = nn.utils.rnn.pad_sequence(alone, batch_first=True)
        return attn.to_out[0](out.flatten(2, 3).to(dtype))


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with query-key norm and RoPE; no biases."""

    _default_processor_cls = AttnProcessor
    _available_processors = [AttnProcessor]
    _supports_qkv_fusion = False  # it would change the checkpoint's keys

    def __init__(self, dim: int, heads: int, qk_norm: bool, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(dim, dim, bias=False)
        self.to_v = Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(dim // heads, eps) if qk_norm else None
        self.norm_k = RMSNorm(dim // heads, eps) if qk_norm else None
        self.set_processor(self._default_processor_cls())

    @property
    def rows(self) -> torch.dtype | None:
        """The 8-bit dtype that `forward` can be given its input in."""
        return shared_rows(self.to_q, self.to_k, self.to_v)

    def forward(self, x: Tensor | QuantizedRows, rope: Rope, keys: Keys = ALL_KEYS) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.processor(self, x, rope, keys)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), hidden width 8/3 D."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.w1 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)

    @property
    def rows(self) -> torch.dtype | None:
        """The 8-bit dtype that `forward` can be given its input in."""
        return shared_rows(self.w1, self.w3)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        return self.w2(silu_mul(self.w1(x), self.w3(x)))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and after; with ``modulation`` the timestep scales and gates."""

    def __init__(self, dim: int, heads: int, norm_eps: float, qk_norm: bool, modulation: bool = True):
        super().__init__()
        self.attention = Attention(dim, heads, qk_norm, eps=1e-5)
        self.feed_forward = FeedForward(dim)
        self.attention_norm1 = RMSNorm(dim, norm_eps)
        self.ffn_norm1 = RMSNorm(dim, norm_eps)
        self.attention_norm2 = RMSNorm(dim, norm_eps)
        self.ffn_norm2 = RMSNorm(dim, norm_eps)
        self.modulation = modulation
        if modulation:
            self.adaLN_modulation = nn.Sequential(Linear(min(dim, ADALN_DIM), 4 * dim))

    def forward(
        self,
        hidden_states: Tensor,
        rope: Rope,
        keys: Keys = ALL_KEYS,
        temb: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            hidden_states: named as diffusers' caches look for it.
            keys: what attention sees.
            temb: (B or 1, A) timestep embedding, for a modulated block.
            modulation: (B or 1, 4 D) ``adaLN_modulation(temb)`` computed beforehand, instead of ``temb``.
        """
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if self.modulation:
            if modulation is None:
                modulation = self.adaLN_modulation(temb)
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.unsqueeze(1).chunk(4, dim=-1)
        x = hidden_states
        y = self.attention(self.attention_norm1(x, scale=scale_msa, rows=self.attention.rows), rope, keys)
        x = self.attention_norm2(y, residual=x, gate=gate_msa)
        y = self.feed_forward(self.ffn_norm1(x, scale=scale_mlp, rows=self.feed_forward.rows))
        return self.ffn_norm2(y, residual=x, gate=gate_mlp)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256, then an MLP: times (B,) -> (B, A)."""

    def __init__(self, out_dim: int, hidden_dim: int = 1024, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Linear(frequencies, hidden_dim), nn.SiLU(), Linear(hidden_dim, out_dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The sinusoid is computed in fp32 whatever ``dtype`` the MLP runs in: times reach 1000."""
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))
