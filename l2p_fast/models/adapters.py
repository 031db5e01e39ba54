"""Adapters over a model's linear layers: what a LoRA file changes, added to what the layer computes.

`AdapterLayer` is a layer of PEFT's, so that diffusers' functions (``set_adapters``, ``fuse_lora``, ``unload_lora``)
work on it. PEFT's own are not used: they take nothing but ``nn.Linear`` and would read DoRA's norms off 8-bit codes.
This one lies over whatever computes a linear layer, in any number of bits, and takes every kind of `formats.changes`.
Plain pairs bear PEFT's names (``lora_A.NAME.weight``), so they are trained and saved as PEFT's are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UserError, few
from ..formats.changes import Change, Pair
from ..formats.names import plain_name
from ..formats.shapes import HEAD

CLOSED = "a LoRA can't be fused into weights of so few bits, or where a bias is lacking; keep the adapter"


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer with any number of adapters over it.

    Args:
        base_layer: x (..., I) -> (..., O); anything that computes a linear layer.
    """

    adapter_layer_names = ("lora_A", "lora_B", "changes")
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.changes = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []

    def add(self, name: str, change: Change) -> None:
        """Add ``change`` as the adapter ``name``, at strength 1; `set_adapter` puts it to use."""
        if change.is_plain:
            down, up = change.kind.down.flatten(1), change.kind.up.flatten(1)
            self.lora_A[name], self.lora_B[name] = _linear(down), _linear(up)
            self.r[name] = len(down)
        else:
            change.settle(weight_of(self.get_base_layer(), torch.float32))
            self.changes[name] = change
            self.r[name] = 0
        self.scaling[name] = 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter; one that this layer lacks is passed over."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the adapters in use."""
        for name in self._used():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None: strength 1."""
        for name in self._used():
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _used(self) -> Iterator[str]:
        return (name for name in self.active_adapters if name in self.scaling)

    def change_of(self, name: str) -> Change:
        """The adapter ``name`` as a `Change`."""
        if name in self.changes:
            return self.changes[name]
        return Change(Pair(self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()))

    def can_merge(self, names: list[str]) -> bool:
        """Whether the weight (and bias) of the layer can take the adapters ``names``."""
        base = self.get_base_layer()
        return all(fits_sums(base, self.change_of(name)) for name in names if name in self.scaling)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the layer's weight; see `fits_sums` for those that can't be.

        Raises:
            UserError: the weight can't take them, or (with ``safe_merge``) would not be finite.
        """
        names = [name for name in adapter_names or list(self._used()) if name in self.scaling]
        names = [name for name in names if name not in self.merged_adapters]
        if not names:
            return
        if not self.can_merge(names):
            raise UserError(CLOSED)
        base = self.get_base_layer()
        gain, delta, bias = self._sums(names)
        weight = weight_of(base, torch.float32)
        merged = weight * (1 + gain) + delta
        if safe_merge and not merged.isfinite().all():
            raise UserError(f"with {few(names)} a layer would hold infinite values; try a lower scale")
        put_weight(base, merged)
        if bias is not None:
            base.bias.add_(bias.to(base.bias))
        self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapters out again, up to rounding."""
        if not self.merged_adapters:
            return
        base = self.get_base_layer()
        gain, delta, bias = self._sums(self.merged_adapters)
        put_weight(base, (weight_of(base, torch.float32) - delta) / (1 + gain))
        if bias is not None:
            base.bias.sub_(bias.to(base.bias))
        self.merged_adapters = []

    def _sums(self, names: list[str]) -> tuple[Tensor | float, Tensor | float, Tensor | None]:
        """(g, d, b) with W' = W + g W + d and the bias b more, of the adapters ``names`` together."""
        gain, delta, bias = 0.0, 0.0, None
        for name in names:
            change, scale = self.change_of(name), self.scaling[name]
            more, by = change.terms()
            gain, delta = gain + scale * more, delta + scale * by
            if change.bias is not None:
                bias = scale * change.bias.float() + (0 if bias is None else bias)
        return gain, delta, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return out
        for name in self._used():
            if name in self.changes:
                more = self.changes[name](x, self.get_base_layer())
            else:
                down, up = self.lora_A[name], self.lora_B[name]
                more = up(down(x.to(down.weight.dtype)))
            out = out + (more if self.scaling[name] == 1 else more * self.scaling[name]).to(out.dtype)
        return out


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return layer


# --- Weights of every kind of layer ----------------------------------------------------------------------------------
def weight_of(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The values of a layer's weight, whatever form it keeps them in."""
    return module.weight_in(dtype) if hasattr(module, "weight_in") else module.weight.detach().to(dtype)


def put_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a layer another weight, rounded to its own form."""
    if hasattr(module, "load_weight"):
        module.load_weight([weight], weight.device)
    else:
        module.weight.data.copy_(weight)


def device_of(module: nn.Module) -> torch.device:
    """Where a layer is."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


def is_rounded(module: nn.Module) -> bool:
    """Whether a layer's weight has fewer than 16 bits."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "weight_in") or weight is None or weight.dtype.itemsize == 1


def fits_sums(module: nn.Module, change: Change) -> bool:
    """Whether ``change`` can be merged: into 16 bits or more, or by a module that rounds its weight itself."""
    if change.bias is not None and getattr(module, "bias", None) is None:
        return False
    return hasattr(module, "load_weight") or not is_rounded(module)


def base_of(module: nn.Module) -> nn.Module:
    """The layer itself, below the adapters that lie over it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


# --- A model with adapters -------------------------------------------------------------------------------------------
def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's own parameters by name, also where weights lie in few bits or below adapters."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    own = [f"{name}.{part}." for name, layer in layers.items() for part in layer.adapter_layer_names]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(tuple(own))}
    for name, module in model.named_modules():
        if hasattr(module, "weight_in"):
            own = hasattr(module, "in_features")
            shapes[f"{name}.weight"] = (module.out_features, module.in_features) if own else tuple(module.shape)
    return {plain_name(name): shape for name, shape in shapes.items()}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """In this context the layers of ``model`` compute as if no adapters lay over them, bit for bit.

    PEFT's ``enable_adapters`` says of parameters, too, that they are not trained, which sharding doesn't bear.
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adaptable(module: nn.Module) -> bool:
    """Whether an adapter can lie over ``module``: it computes a linear layer."""
    return isinstance(module, (nn.Linear, BaseTunerLayer)) or hasattr(module, "weight_in")


def check_fusing(model: nn.Module) -> None:
    """That every adapter in use can be merged.

    Raises:
        UserError: it can't; nothing is changed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
    closed = [name for name, layer in layers.items() if not layer.can_merge(layer.active_adapters)]
    if closed:
        raise UserError(f"{few(closed)}: {CLOSED}")


def add_adapter(model: nn.Module, changes: Mapping[str, Change], name: str) -> None:
    """Lay ``changes`` over the model's layers as the adapter ``name``, in its dtype and where each layer is.

    Raises:
        UserError: an adapter of that name is there, or a layer is none that adapters can lie over.
    """
    configs = getattr(model, "peft_config", {})
    if name in configs:
        raise UserError(f"there is an adapter {name} already; give another name")
    modules = dict(model.named_modules())
    closed = [m for m in changes if m not in modules or not is_adaptable(modules[m]) or m.startswith(HEAD)]
    if closed:
        raise UserError(
            f"no adapter can lie over {few(closed)}, only over linear layers of the transformer; merge it: "
            "l2p_fast.load_lora(model, FILE)"
        )
    for module_name, change in changes.items():
        layer = modules[module_name]
        if not isinstance(layer, AdapterLayer):
            layer = AdapterLayer(layer)
            model.set_submodule(module_name, layer)
        layer.add(name, change.to(device_of(layer.base_layer)))
        for part in AdapterLayer.adapter_layer_names:
            if name in (held := getattr(layer, part)):
                held[name].to(dtype=model.dtype)
    rank = max((change.kind.down.shape[0] for change in changes.values() if change.is_plain), default=1)
    own = {m: c.kind.down.shape[0] for m, c in changes.items() if c.is_plain and c.kind.down.shape[0] != rank}
    model.peft_config = configs | {
        name: LoraConfig(
            r=rank, lora_alpha=rank, rank_pattern=own, alpha_pattern=dict(own), target_modules=sorted(changes)
        )
    }
    model._hf_peft_config_loaded = True
