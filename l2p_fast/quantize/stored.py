"""Weights that stay in memory as their file has them: INT8, float8, GGUF's types. Decoded for each product.

The values are those that reading the file into the computing dtype would give, so an image is the same either way. Left
out: products in 8 bits (`products` has them; they round activations, too) and training.

N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..formats.decode import codes_shape, decode
from ..formats.header import Stored
from ..formats.values import DTYPES
from ..ops import Linear, linear
from .coded import CodedLinear

PIECE = 1 << 22  # values decoded at a time, so that no weight is whole in fp32


class StoredLinear(CodedLinear):
    """A linear layer whose weight is a quantized tensor of a file; the bias, if any, is a plain parameter.

    Args:
        stored: the weight (N, K); only what it is, its codes come with `load_codes`.
        bias: whether there is one.
    """

    def __init__(self, stored: Stored, bias: bool = False):
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.shape
        self.kind, self.rotation = stored.dtype, stored.rotation
        with torch.device("meta"):
            self.register_buffer("weight", torch.empty(codes_shape(stored), dtype=DTYPES[stored.dtype]))
            scale = None if stored.scale is None else torch.empty(stored.scale.numel)
            self.register_buffer("weight_scale", scale)
            self.register_parameter("bias", nn.Parameter(torch.empty(self.out_features)) if bias else None)

    def load_codes(self, codes: Tensor, scale: Tensor | None, device: torch.device | str) -> None:
        """Keep a weight, as `formats.values.read_codes` gives it, on ``device``."""
        self.weight = codes.to(device)
        self.weight_scale = None if scale is None else scale.reshape(-1).to(device)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in ``dtype``."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        rows, scale = max(1, PIECE // self.in_features), self.weight_scale
        for first in range(0, self.out_features, rows):
            part = slice(first, first + rows)
            one = scale if scale is None or scale.numel() == 1 else scale[part]
            out[part] = decode(self.weight[part], self.kind, one, self.rotation)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight_in(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def keep_stored(module: nn.Module, tensors: Mapping[str, Stored], prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """Make the linear layers of ``module`` (on the meta device), whose weights are quantized, keep them so.

    Args:
        tensors: by the names of ``module`` with ``prefix`` before them.
        skip: words of names that are left out.
    """
    for path, layer in list(module.named_modules()):
        stored = tensors.get(f"{prefix}{path}.weight")
        if stored is None or not stored.quantized or any(word in path for word in skip):
            continue
        if type(layer) in (nn.Linear, Linear):
            module.set_submodule(path, StoredLinear(stored, layer.bias is not None))


def keep_blocks(model: nn.Module, tensors: Mapping[str, Stored]) -> None:
    """`keep_stored` for each of ``model.blocks()``; what is quantized elsewhere is dequantized when it is read."""
    for name, block in model.blocks():
        keep_stored(block, tensors, f"{name}.")


def kinds(model: nn.Module) -> list[str]:
    """The types that weights of ``model`` are kept in, the most used first."""
    counts: dict[str, int] = {}
    for layer in _layers(model):
        counts[layer.kind] = counts.get(layer.kind, 0) + layer.out_features * layer.in_features
    return sorted(counts, key=lambda kind: -counts[kind])


def _layers(model: nn.Module) -> Iterator[StoredLinear]:
    return (module for module in model.modules() if isinstance(module, StoredLinear))
