"""Which device draws, in which dtype, and how much memory it has left."""

from __future__ import annotations

import torch

from .. import ops
from ..errors import FieldError
from .request import Setup


def pick_device(setup: Setup) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        FieldError: a device that is absent.
    """

    def present(kind: str, index: int) -> bool:
        if kind == "mps":
            return torch.backends.mps.is_available()
        module = getattr(torch, kind, None)
        return kind == "cpu" or (module is not None and module.is_available() and index < module.device_count())

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if setup.device != "auto":
        device = torch.device(setup.device)
        if not present(device.type, device.index or 0):
            raise FieldError("device", f"{setup.device}: torch {torch.__version__} sees none; try {{device}} cpu")
    if setup.offload not in ("none", "auto") and device.type == "cpu":
        raise FieldError("offload", f"{setup.offload} needs a GPU, and torch sees none; leave it out")
    return device


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The dtype to load in (None: as the checkpoint is) and why, as words."""
    if name != "auto":
        return getattr(torch, name), ""
    if device.type == "cpu" and not ops.cpu_has_fast_bf16():
        return torch.float32, " (this CPU has no fast bfloat16)"
    return None, ""


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU with memory of its own; None: it has none, or doesn't tell."""
    module = getattr(torch, device.type, None)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else None
