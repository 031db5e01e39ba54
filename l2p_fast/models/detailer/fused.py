"""The ways to run a level of the Detailer Head (`bands.Run`): by the library's convolutions, or by one op each.

The op composes the decoder's convolutions (ops/head.py). It has no gradients and wants plain weights in bfloat16 or, on
a CPU, float32; all else is the library's. A CPU on which bfloat16 does not pay runs either in float32. On CUDA the op
runs the outer levels, and the library the inner ones, with weights that are brought into its form once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import activate, decoder_weights, encoder_weights, head_decode, head_encode
from .bands import Rows

if TYPE_CHECKING:
    from .unet import DetailerHead


def silu(x: Tensor) -> Tensor:
    """SiLU, in place where no gradient needs the input."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _is_whole(rows: Rows) -> bool:
    return rows.start == 0 and rows.stop == rows.height


class Library:
    """Levels by the library's convolutions, differentiable.

    A convolution pads every edge of its window with zeros. At the image's own edge that is right; elsewhere the window
    has one row more than wanted, and the row that the padding spoiled is cut off.
    """

    def __init__(self, head: DetailerHead, dtype: torch.dtype):
        self.head, self.dtype = head, dtype

    def encode(
        self, k: int, x: Tensor, held: Rows, rows: Rows, keep: bool = True, pool: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        enc, _, _ = self.head.convolutions(k)
        needed = rows.grow(1)
        window = needed.of(x, held).to(self.dtype, memory_format=torch.channels_last)
        skip = silu(rows.of(self._convolve(enc, window), needed))
        return skip if keep else None, F.max_pool2d(skip, 2) if pool else None

    def bottleneck(self, x: Tensor, features: Tensor) -> Tensor:
        return silu(self.head.bottleneck[0](x, features))

    def decode(self, k: int, x: Tensor, held: Rows, skip: Tensor, skip_held: Rows, rows: Rows) -> Tensor:
        _, up, dec = self.head.convolutions(k)
        needed, wide = rows.grow(1), rows.grow(2)
        covered = wide.pooled()
        x = wide.of(F.interpolate(covered.of(x, held), scale_factor=2.0), covered.doubled())
        x = needed.of(self._convolve(up, x), wide)
        x = torch.cat([x, needed.of(skip, skip_held)], dim=1)
        x = silu(rows.of(self._convolve(dec, x), needed))
        return self._convolve(self.head.out_conv, x) if k == 0 else x

    def _convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """``conv``, in the dtype of x if it is plain, else (an adapter) in its own."""
        if type(conv) is nn.Conv2d and conv.weight.dtype != x.dtype:
            return F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=conv.padding)
        return conv(x.to(conv.weight.dtype)).to(x.dtype)


class Inner:
    """Levels from ``first`` on and the bottleneck, whole, by the library's channels-last convolutions. No gradients.

    What follows a convolution is one op (`ops.activate`), and ``dec`` over a concat is a sum of two convolutions.
    Nearest x2 and ``up`` are one transposed convolution: of ``up``'s three taps one or two read the same pixel.
    """

    def __init__(self, head: DetailerHead, first: int, dtype: torch.dtype):
        self.first, self.levels = first, []
        joint = head.bottleneck[0]
        pooled = head.levels[-1].enc
        on_x, on_features = (
            joint.weight.detach().flatten(1).to(dtype).split([pooled, joint.in_channels - pooled], dim=1)
        )
        self.joint = on_x.contiguous(), on_features.contiguous(), joint.bias.detach().float()[None]
        for k in range(first, len(head.levels)):
            self.levels.append(self._level(*head.convolutions(k), dtype))

    @staticmethod
    def _level(enc: nn.Conv2d, up: nn.Conv2d, dec: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Weights and biases: of ``enc``, of ``up`` transposed, of ``dec`` on ``up`` and on the skip.

        ``up``'s bias comes to ``dec`` from within the image alone: (9, C) by first, inner, last row and column.
        """
        wide = torch.promote_types(dec.weight.dtype, torch.float32)
        on_up, on_skip = dec.weight.detach().split([up.out_channels, dec.in_channels - up.out_channels], dim=1)
        taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device=up.weight.device, dtype=wide)
        transposed = torch.einsum("ka,lb,oiab->iokl", taps, taps, up.weight.detach().to(wide))
        carried = torch.einsum("ocab,c->abo", on_up.to(wide), up.bias.detach().to(wide))
        inside = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0]], device=up.weight.device, dtype=wide)
        bias = dec.bias.detach().to(wide) + torch.einsum("ra,cb,abo->rco", inside, inside, carried)
        weights = enc.weight.detach(), transposed, on_up, on_skip
        stored = [w.to(dtype).contiguous(memory_format=torch.channels_last) for w in weights]
        return *stored, enc.bias.detach().float()[None], bias.flatten(0, 1).float()

    def encode(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, _, _, _, bias, _ = self.levels[k - self.first]
        out = F.conv2d(x, weight, padding=1).permute(0, 2, 3, 1)
        skip, pooled = activate(out, None, bias, pool=True)
        return skip.permute(0, 3, 1, 2), pooled.permute(0, 3, 1, 2)

    def bottleneck(self, x: Tensor, features: Tensor) -> Tensor:
        on_x, on_features, bias = self.joint
        tokens = features.to(x.dtype).permute(0, 2, 3, 1)  # the transformer's own layout: no copy
        mapped = F.linear(tokens, on_features)
        if mapped.shape[1:3] != x.shape[2:]:
            mapped = F.interpolate(mapped.permute(0, 3, 1, 2), size=x.shape[2:], mode="nearest").permute(0, 2, 3, 1)
        out, _ = activate(F.linear(x.permute(0, 2, 3, 1), on_x), mapped, bias)
        return out.permute(0, 3, 1, 2)

    def decode(self, k: int, x: Tensor, skip: Tensor) -> Tensor:
        _, transposed, on_up, on_skip, _, bias = self.levels[k - self.first]
        up = F.conv2d(F.conv_transpose2d(x, transposed, stride=2, padding=1), on_up, padding=1)
        out, _ = activate(up.permute(0, 2, 3, 1), F.conv2d(skip, on_skip, padding=1).permute(0, 2, 3, 1), bias)
        return out.permute(0, 3, 1, 2)


class Kernels:
    """The outer ``count`` levels by one op each, with weights composed and packed once in ``dtype``. No gradients."""

    def __init__(self, head: DetailerHead, count: int, dtype: torch.dtype):
        self.state, self.biases = self._state(head), self._biases(head)
        self.library, self.inner = Library(head, dtype), None
        if count < len(head.levels):
            self.inner = Inner(head, count, dtype)
        self.encoders, self.decoders = [], []
        for k in range(count):
            enc, up, dec = head.convolutions(k)
            self.encoders.append(encoder_weights(enc, dtype))
            self.decoders.append(decoder_weights(up, dec, head.out_conv if k == 0 else None, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as the ops want them."""
        values = [value for weights in (*self.encoders, *self.decoders) for value in weights]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def is_of(self, head: DetailerHead) -> bool:
        """Whether the head's weights are still those. On a GPU this waits for it."""
        return self.looks_like(head) and torch.equal(self.biases, self._biases(head))

    def looks_like(self, head: DetailerHead) -> bool:
        """Whether the head's weights are where they were, and were not written to but through ``.data``."""
        return self.state == self._state(head)

    @staticmethod
    def _state(head: DetailerHead) -> list[tuple[int, int]]:
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in head.parameters()]

    @staticmethod
    def _biases(head: DetailerHead) -> Tensor:
        """Writing through ``.data`` changes no version; what trains or averages weights so changes biases, too."""
        return torch.cat([p.detach() for p in head.parameters() if p.ndim == 1])

    def encode(
        self, k: int, x: Tensor, held: Rows, rows: Rows, keep: bool = True, pool: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        if k >= len(self.encoders):
            if _is_whole(rows):
                return self.inner.encode(k, x)
            return self.library.encode(k, x, held, rows, keep, pool)
        skip, pooled = head_encode(
            x.permute(0, 2, 3, 1),
            self.encoders[k],
            x_start=held.start,
            start=rows.start,
            stop=rows.stop,
            height=rows.height,
            keep=keep,
            pool=pool,
        )
        return skip.permute(0, 3, 1, 2), pooled.permute(0, 3, 1, 2)

    def bottleneck(self, x: Tensor, features: Tensor) -> Tensor:
        return (self.inner or self.library).bottleneck(x, features)

    def decode(self, k: int, x: Tensor, held: Rows, skip: Tensor, skip_held: Rows, rows: Rows) -> Tensor:
        if k >= len(self.decoders):
            if _is_whole(rows):
                return self.inner.decode(k, x, skip)
            return self.library.decode(k, x, held, skip, skip_held, rows)
        out = head_decode(
            x.permute(0, 2, 3, 1),
            skip.permute(0, 2, 3, 1),
            self.decoders[k],
            x_start=held.start,
            skip_start=skip_held.start,
            start=rows.start,
            stop=rows.stop,
            height=rows.height,
        )
        return out if k == 0 else out.permute(0, 3, 1, 2)
