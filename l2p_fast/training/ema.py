"""An exponential moving average of the trained weights, in fp32, sharded as they are, on their device or on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import EMAConfig
from .parallel import like_sharded, local


class EMA:
    """The average; an empty one when ``config.decay`` is 0."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: EMAConfig):
        self.named, self.config = named, config
        self.average: dict[str, Tensor] = {}
        if config.decay:
            for name, parameter in named.items():
                weight = local(parameter.detach())
                self.average[name] = weight.to(config.device or weight.device, torch.float32, copy=True)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` updates; early ones weigh less, so that the start is soon forgotten."""
        if step % self.config.every:
            return
        decay = min(self.config.decay**self.config.every, (1 + step) / (10 + step))
        for name, value in self.average.items():
            value.lerp_(local(self.named[name]).to(value.device, torch.float32), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; the storage is shared."""
        return {name: like_sharded(value, self.named[name]) for name, value in self.average.items()}
