"""What the linear layers that hold their weight as codes have in common."""

from __future__ import annotations

from torch import Tensor, nn


class CodedLinear(nn.Linear):
    """A linear layer that holds ``weight`` and ``weight_scale`` as buffers, in a form of its own.

    PEFT takes it for a linear layer, so adapters can be put over it.
    """

    def _apply(self, fn, recurse: bool = True):
        """Codes are moved with the model, but never cast with it."""
        own = {id(buffer) for buffer in self._buffers.values() if buffer is not None}

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype or id(x) not in own else x.to(moved.device)

        return super()._apply(move, recurse)
