"""Z-Image's transformer as one flat function over rectangular batches, for training it on a CPU.

The same parameters and the same result as `ZImageTransformer2DModel`, without lists of ragged tensors, so that a
compiler fuses all that stands between the matrix products; queries, keys and values are one product, so are the two
halves of the gate. Every text fits the one length that shorter ones are filled up to.

B batch, N image tokens, L text tokens (filled up), D width, E width of a head.
"""

from __future__ import annotations

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from l2p_fast.models.blocks import SEQUENCE_MULTIPLE, rope_tables

Rope = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """(B, N, heads, E), pairs of neighbours turned."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def weights(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a transformer block, in the order of `block`; of its modulation: none, or weight and bias."""
    a, f = layer.attention, layer.feed_forward
    modules = (layer.attention_norm1, a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k, a.to_out[0], layer.attention_norm2,
               layer.ffn_norm1, f.w1, f.w3, f.w2, layer.ffn_norm2)  # fmt: skip
    modulation = [layer.adaLN_modulation[0].weight, layer.adaLN_modulation[0].bias] if layer.modulation else []
    return [module.weight for module in modules], modulation


def block(
    tensors: list[Tensor], modulation: list[Tensor], heads: int, x: Tensor, rope: Rope, temb: Tensor | None
) -> Tensor:
    """One transformer block, (B, N, D) -> (B, N, D); ``temb`` (B, A) for a modulated one."""
    norm1, q, k, v, norm_q, norm_k, out, norm2, ffn_norm1, w1, w3, w2, ffn_norm2 = tensors
    scales = None if temb is None else F.linear(temb, *modulation).unsqueeze(1).chunk(4, dim=-1)
    y = rms_norm(x, norm1)
    y = y if scales is None else y * (1 + scales[0])
    qkv = F.linear(y, torch.cat([q, k, v]))
    query, key, value = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))
    query, key = rotate(rms_norm(query, norm_q), rope), rotate(rms_norm(key, norm_k), rope)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    # Written out: so few tokens take the library's fused attention twice as long, most of it in the backward pass.
    shares = (query @ key.mT * query.shape[-1] ** -0.5).float().softmax(-1).to(value.dtype)
    y = rms_norm(F.linear((shares @ value).transpose(1, 2).flatten(2), out), norm2)
    x = x + (y if scales is None else scales[1].tanh() * y)
    y = rms_norm(x, ffn_norm1)
    y = y if scales is None else y * (1 + scales[2])
    gate, up = F.linear(y, torch.cat([w1, w3])).chunk(2, dim=-1)
    y = rms_norm(F.linear(F.silu(gate) * up, w2), ffn_norm2)
    return x + (y if scales is None else scales[3].tanh() * y)


compiled_block = torch.compile(block, dynamic=False)


def ropes(model: ZImageTransformer2DModel, grid: int) -> tuple[Rope, Rope]:
    """RoPE of image tokens and of image and text tokens, for a ``grid`` x ``grid`` image and one length of text."""
    text = torch.zeros(SEQUENCE_MULTIPLE, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(1, SEQUENCE_MULTIPLE + 1)
    image = torch.zeros(grid**2, 3, dtype=torch.float64)
    image[:, 0] = SEQUENCE_MULTIPLE + 1
    image[:, 1] = torch.arange(grid).repeat_interleave(grid)
    image[:, 2] = torch.arange(grid).repeat(grid)
    return tuple(
        rope_tables(positions, model.config.axes_dims, model.config.rope_theta)
        for positions in (image, torch.cat([image, text]))
    )


def forward(
    model: ZImageTransformer2DModel, latent: Tensor, t: Tensor, text: Tensor, length: Tensor, image: Rope, joint: Rope,
    probe_layer: int, compiled: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The raw prediction, and what image tokens are after ``probe_layer``.

    Args:
        latent: (B, C, H, W); t: (B,) model time 1 - sigma.
        text: (B, L, F) features, ``length`` (B,) of them real; L is `SEQUENCE_MULTIPLE`.
        image, joint: `ropes`.
    """
    batch, channels, height, width = latent.shape
    run, heads = compiled_block if compiled else block, model.config.n_heads
    frequencies = model.t_embedder.timestep_embedding(t * model.t_scale, model.t_embedder.frequency_embedding_size)
    temb = model.t_embedder.mlp(frequencies)
    x = latent.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    x = model.all_x_embedder["2-1"](x)
    for layer in model.noise_refiner:
        x = run(*weights(layer), heads, x, image, temb)
    norm, linear = model.cap_embedder
    words = linear(rms_norm(text, norm.weight))
    real = torch.arange(text.shape[1], device=text.device) < length[:, None]
    words = torch.where(real.unsqueeze(-1), words, model.cap_pad_token.to(words.dtype))
    of_text = tuple(table[x.shape[1] :] for table in joint)
    for layer in model.context_refiner:
        words = run(*weights(layer), heads, words, of_text, None)
    tokens, probed = x.shape[1], x
    x = torch.cat([x, words], dim=1)
    for i, layer in enumerate(model.layers):
        x = run(*weights(layer), heads, x, joint, temb)
        probed = x[:, :tokens] if i == probe_layer else probed
    last = model.all_final_layer["2-1"]
    x = last.linear(
        F.layer_norm(x[:, :tokens].float(), x.shape[-1:], eps=1e-6) * (1 + last.adaLN_modulation(temb)[:, None])
    )
    x = x.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, height, width), probed
