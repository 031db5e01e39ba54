"""The network's part of a denoising step as a CUDA graph: some hundred launches become one.

A graph repeats what was launched while it was captured, with the same addresses and numbers. So all that differs from
step to step is copied into tensors of its own first, and nothing that Python decides may change meanwhile: no adapter's
strength, no attention backend, no weight's place. `obstacle` names the models that decide something at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models.pixel import PixelModel

logger = logging.getLogger(__name__)


class Graph(NamedTuple):
    """A captured call.

    Attributes:
        inputs: where the graph reads them.
        replay: launches it.
        out: what it writes.
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    out: Tensor


class Graphed:
    """``function``, run by CUDA graphs. The plain reference is the function itself.

    Of inputs of new shapes the first call is the function's own, so that all that is made once is made; the second is
    captured, and from then on the graph is replayed. What can't be captured goes on plainly, with a warning that says
    why.

    Args:
        function: takes tensors of one GPU, and plain values, in any nesting of tuples, lists and dicts; returns a
            tensor. Equal shapes and values must mean equal launches.

    Attributes:
        obstacle: why no graphs are used any more; None: they are.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.obstacle = function, None
        self._graphs: dict[Any, Graph | None] = {}

    def __call__(self, *args: Any) -> Tensor:
        """The function's result. The next call may write over it."""
        leaves, form = pytree.tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = form, tuple(map(_kind, leaves))
        if self.obstacle is not None or key not in self._graphs:
            self._graphs[key] = None
            return self.function(*args)
        graph = self._graphs[key] = self._graphs[key] or self._captured(leaves, form)
        if graph is None:
            return self.function(*args)
        for held, given in zip(graph.inputs, tensors, strict=True):
            held.copy_(given)
        graph.replay()
        return graph.out

    def forget(self) -> None:
        """Give back the memory of all graphs; what is called again is captured again."""
        self._graphs.clear()

    def _captured(self, leaves: list[Any], form: pytree.TreeSpec) -> Graph | None:
        held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in held if isinstance(leaf, Tensor)]
        args = pytree.tree_unflatten(held, form)
        try:
            return Graph(inputs, *capture(lambda: self.function(*args), inputs[0].device))
        except RuntimeError as error:  # each library refuses in its own way; too little memory is one, too
            self.obstacle = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
            self.forget()
            logger.warning("no CUDA graph is used: %s", self.obstacle)
            return None


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def capture(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture a call of ``function`` on a GPU: what replays it, and the result that a replay writes.

    Raises:
        RuntimeError: it did what a graph can't hold, such as waiting for the GPU, or took more memory than there is.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        out = function()
    return graph.replay, out


def obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Why steps of ``model`` on ``device`` are not captured, as words. None: it is tried."""
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if not isinstance(model, PixelModel):
        return f"{type(model).__name__} may do another thing at every step"
    if getattr(model, "is_cache_enabled", False):
        return "a cache decides at every step what is computed"
    if getattr(model, "peft_config", None):
        return "adapters lie over the model, whose strength may change; merge them"
    if any(getattr(module, hook, None) for module in model.modules() for hook in ("_diffusers_hook", "_hf_hook")):
        return "offloading brings weights to another place at every step"
    return None
