"""Which of diffusers' attention backends runs: what each needs, and which is fastest here.

On a GPU ``auto`` times those that are installed at the run's own shape, once, and takes the fastest. Backends that
round (sage) are taken only by name. Nothing falls back silently: a backend that is named and can't run is an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch

_KERNELS = ("kernels", "pip install kernels")
_FLASH = ("flash_attn", "pip install flash-attn --no-build-isolation")
_SAGE = ("sageattention", "pip install sageattention")
# What a backend's name needs and how to get it.
BACKENDS: dict[str, tuple[str, str] | None] = {
    "auto": None,
    "native": None,
    "_native_flash": None,
    "_native_efficient": None,
    "_native_math": None,
    "_native_cudnn": None,
    "flex": None,
    "flash": _FLASH,
    "flash_hub": _KERNELS,
    "flash_4_hub": _KERNELS,
    "_flash_3": ("flash_attn_interface", "build FlashAttention-3 from source, or take --attention _flash_3_hub"),
    "_flash_3_hub": _KERNELS,
    "sage": _SAGE,
    "sage_hub": _KERNELS,
    "xformers": ("xformers", "pip install xformers"),
}
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "xformers")  # exact, nothing to download
TEXT_TOKENS = 64  # a usual prompt's
TAKES_BIAS = ("auto", "native", "_native_efficient", "_native_math", "_native_cudnn", "flex", "xformers")


def available(name: str) -> bool:
    """Whether the package that a backend needs is installed."""
    needed = BACKENDS[name]
    return needed is None or importlib.util.find_spec(needed[0]) is not None


def measure(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Milliseconds of one attention over queries, keys and values of ``shape`` (B, N, H, E), median of five.

    Raises:
        Exception: whatever the backend raises when it can't run here.
    """
    import torch
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    module = torch.get_device_module(device)
    times = []
    with torch.inference_mode(), attention_backend(name):
        for _ in range(2 + 5):
            start, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
            start.record()
            dispatch_attention_fn(query, key, value)
            end.record()
            module.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times[2:])[2]


def fastest(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, biased: bool
) -> tuple[str, str]:
    """The fastest of `CANDIDATES` at ``shape`` (B, N, H, E), and the comparison as words. On a CPU there is one."""
    if device.type == "cpu":
        return "native", "torch's scaled_dot_product_attention"
    times, failed = {}, []
    for name in CANDIDATES:
        if not available(name) or biased and name not in TAKES_BIAS:
            continue
        try:
            times[name] = measure(name, shape, dtype, device)
        except Exception as error:  # a kernel may decline a card, dtype or shape in its own way: that is the answer
            failed.append(f"{name} can't: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}")
    if not times:
        raise UserError(f"no attention backend runs on {device} in {dtype}: {'; '.join(failed)}")
    best = min(times, key=times.get)
    return best, ", ".join([f"{name} {ms:.3g} ms" for name, ms in sorted(times.items(), key=lambda x: x[1])] + failed)


def check(name: str, biased: bool) -> None:
    """That a named backend is installed and can do what the model needs.

    Raises:
        UserError: it can't; the message has the install line or names that do.
    """
    if not available(name):
        package, remedy = BACKENDS[name]
        raise UserError(f"--attention {name} needs the package {package}: {remedy}")
    if biased and name not in TAKES_BIAS:
        raise UserError(
            f"--attention {name} can't weigh keys, which this model asks of it; choose from {', '.join(TAKES_BIAS)}"
        )


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run with an attention backend. The choice is process-wide, so it is put back."""
    from diffusers.models.attention_dispatch import attention_backend

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(attention_backend(name))
        except (RuntimeError, ValueError, ImportError) as error:
            raise UserError(f"--attention {name}: {error}") from error
        yield


def lines() -> Iterable[str]:
    """What is there and what to install for more, a line for each backend."""
    for name, needed in BACKENDS.items():
        yield f"{name}: available" if available(name) else f"{name}: missing; {needed[1]}"
