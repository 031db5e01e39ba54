"""What an adapter file does to one layer: low-rank pairs, LoHa, LoKr, whole differences; with DoRA's norms, and a bias.

Each kind is a module: ``delta()`` is the change of the weight, and calling it multiplies by that change without making
it where that is cheaper. Left out: Tucker-decomposed convolutions, and OFT.

O outputs, I inputs, R rank, x (..., I).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class Pair(nn.Module):
    """LoRA: up @ down. Of a convolution, ``down`` has the kernel's shape."""

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.down, self.up = _frozen(down), _frozen(up)  # (R, I, ...), (O, R, ...)

    @property
    def fits(self) -> tuple[int, int]:
        """(O, I x kernel) of the weight that this can change."""
        return self.up.shape[0], math.prod(self.down.shape[1:])

    @property
    def is_whole(self) -> bool:
        """Whether the matrices fit each other."""
        return self.down.dim() > 1 and self.up.dim() > 1 and 0 < self.down.shape[0] == self.up[0].numel()

    def scaled(self, factor: float) -> Pair:
        return self if factor == 1 else Pair(self.down, self.up * factor)

    def rows(self, parts: int) -> list[Pair]:
        """The change of each of ``parts`` weights that lie fused, row block after row block."""
        return [Pair(self.down, up) for up in self.up.chunk(parts)]

    def delta(self) -> Tensor:
        """(O, I x kernel), fp32."""
        return self.up.flatten(1).float() @ self.down.flatten(1).float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class Difference(nn.Module):
    """The whole change of a weight, of any shape."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = _frozen(weight)
        self.is_whole = weight.dim() > 0

    @property
    def fits(self) -> tuple[int, int]:
        return self.weight.shape[0], math.prod(self.weight.shape[1:])

    def scaled(self, factor: float) -> Difference:
        return self if factor == 1 else Difference(self.weight * factor)

    def rows(self, parts: int) -> list[Difference]:
        return [Difference(weight) for weight in self.weight.chunk(parts)]

    def delta(self) -> Tensor:
        return self.weight.float().view(len(self.weight), -1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Hadamard(nn.Module):
    """LoHa (arXiv 2108.06098): the elementwise product of two low-rank matrices."""

    def __init__(self, first: Pair, second: Pair):
        super().__init__()
        self.first, self.second = first, second

    @property
    def fits(self) -> tuple[int, int]:
        return self.first.fits

    @property
    def is_whole(self) -> bool:
        return self.first.is_whole and self.second.is_whole and self.first.fits == self.second.fits

    def scaled(self, factor: float) -> Hadamard:
        return Hadamard(self.first.scaled(factor), self.second)

    def rows(self, parts: int) -> list[Hadamard]:
        return [Hadamard(*both) for both in zip(self.first.rows(parts), self.second.rows(parts), strict=True)]

    def delta(self) -> Tensor:
        return self.first.delta() * self.second.delta()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta().to(x.dtype))


class Kronecker(nn.Module):
    """LoKr (arXiv 2212.10650): the Kronecker product of two matrices, each whole or low-rank."""

    def __init__(self, left: Pair | Difference, right: Pair | Difference):
        super().__init__()
        self.left, self.right = left, right

    @property
    def fits(self) -> tuple[int, int]:
        (p, q), (r, s) = self.left.fits, self.right.fits
        return p * r, q * s

    @property
    def is_whole(self) -> bool:
        return self.left.is_whole and self.right.is_whole

    def scaled(self, factor: float) -> Kronecker:
        return Kronecker(self.left.scaled(factor), self.right)

    def rows(self, parts: int) -> list[nn.Module]:
        if self.left.fits[0] % parts == 0:
            return [Kronecker(left, self.right) for left in self.left.rows(parts)]
        return Difference(self.delta()).rows(parts)

    def delta(self) -> Tensor:
        return torch.kron(self.left.delta(), self.right.delta())

    def forward(self, x: Tensor) -> Tensor:
        """(L kron R) x, with x as a matrix: L x R^T."""
        matrix = self.right(x.unflatten(-1, (self.left.fits[1], -1)))
        return self.left(matrix.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


class Change(nn.Module):
    """What a file does to one layer: W' = W + delta, or with DoRA (arXiv 2402.09353) W' = m (W + delta) / |W + delta|.

    The strength s goes linearly from W to W', so 0 is none: PEFT has it inside the norm, with the same result at 1.

    Args:
        kind: the change of the weight, if any.
        bias: (O,) the change of the bias, if any.
        magnitude: (O,) or (O, 1) m of each row, or (1, I) of each column; None: no DoRA.
    """

    def __init__(self, kind: nn.Module | None = None, bias: Tensor | None = None, magnitude: Tensor | None = None):
        super().__init__()
        self.kind = kind
        self.bias = None if bias is None else _frozen(bias)
        self.magnitude = None if magnitude is None else (magnitude[:, None] if magnitude.dim() < 2 else magnitude)
        self.excess: nn.Parameter | None = None  # m / |W + delta| - 1, which 16 bits hold well

    @property
    def is_plain(self) -> bool:
        """Whether it is a low-rank pair and no more."""
        return isinstance(self.kind, Pair) and self.magnitude is None and self.bias is None

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Compute what DoRA needs of the ``weight`` (O, I, ...) that it will lie over; nothing for others."""
        if self.magnitude is not None:
            whole = weight.float().flatten(1) + self.kind.delta().to(weight.device)
            magnitude = self.magnitude.to(whole.device, torch.float32).flatten(1)
            axis = 1 if magnitude.shape[0] == whole.shape[0] else 0
            norms = torch.linalg.vector_norm(whole, dim=axis, keepdim=True)
            self.excess = _frozen(magnitude / norms.clamp_min(torch.finfo(torch.float32).eps) - 1)

    def terms(self) -> tuple[Tensor | float, Tensor | float]:
        """(g, d) with W' = W + s (g W + d), of shape (O, I x kernel) or broadcast to it; after `settle`."""
        if self.kind is None:
            return 0.0, 0.0
        if self.excess is None:
            return 0.0, self.kind.delta()
        return self.excess.float(), (1 + self.excess.float()) * self.kind.delta()

    @torch.no_grad()
    def added(self, weight: Tensor, scale: float) -> Tensor:
        """What strength ``scale`` adds to the weight of the layer that it lies over, fp32."""
        flat = weight.float().view(len(weight), -1)
        change = self.to(flat.device)
        change.settle(flat)
        gain, delta = change.terms()
        return (scale * (gain * flat + delta)).view(weight.shape)

    def forward(self, x: Tensor, multiply: nn.Module) -> Tensor:
        """What it adds at strength 1 to the output for ``x``; ``multiply`` is the layer that it lies over."""
        if self.excess is not None:
            excess, bias = self.excess.to(x.dtype), getattr(multiply, "bias", None)
            if excess.shape[1] == 1:  # of each output
                product = multiply(x) if bias is None else multiply(x) - bias
                out = excess.view(-1) * product + (1 + excess.view(-1)) * self.kind(x)
            else:
                product = multiply(x * excess) if bias is None else multiply(x * excess) - bias
                out = product + self.kind(x + x * excess)
        else:
            out = 0.0 if self.kind is None else self.kind(x)
        return out if self.bias is None else out + self.bias.to(x.dtype)
