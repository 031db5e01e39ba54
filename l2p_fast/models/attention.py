"""Which of diffusers' attention backends runs: what each needs, and which is fastest here.

On a GPU ``auto`` times those that are installed at the run's own shape, once, and takes the fastest. Backends that
round (sage) are taken only by name. Nothing falls back silently: a backend that is named and can't run is an error.

Rows of different lengths are packed one behind the other and attended in one call where the backend has a kernel for
that (`packed_kernel`), else row by row. N tokens of a row, H heads, E head width.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Packed = Callable[[Tensor, Tensor, Tensor, "Ragged"], Tensor]


class Ragged(NamedTuple):
    """Rows of different lengths, lying one behind the other. Made once for a run: a block then copies nothing to the
    GPU, so that it can be captured as a graph.

    Attributes:
        lengths: tokens of each of B rows.
        ends: (B + 1,) int32 on the rows' device: 0, then where each row ends.
    """

    lengths: tuple[int, ...]
    ends: Tensor

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device | str) -> Ragged:
        """Rows of ``lengths`` tokens on ``device``."""
        import torch

        lengths = tuple(lengths)
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device))


def pack(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first ``lengths[i]`` tokens of each row one behind the other: (B, N, H, E) -> (sum of lengths, H, E)."""
    import torch

    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def packed_attention_reference(query: Tensor, key: Tensor, value: Tensor, rows: Ragged) -> Tensor:
    """Attention of each row to itself, of rows that lie one behind the other: (sum of lengths, H, E) -> the same."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    alone = zip(*(x.split(list(rows.lengths)) for x in (query, key, value)), strict=True)
    heads_first = ((x.transpose(0, 1)[None] for x in row) for row in alone)
    return torch.cat([scaled_dot_product_attention(*row)[0].transpose(0, 1) for row in heads_first])


def _varlen(module: str, name: str) -> Packed:
    """`packed_attention_reference` by a function that takes row boundaries the way FlashAttention's does."""

    def attend(query: Tensor, key: Tensor, value: Tensor, rows: Ragged) -> Tensor:
        function = getattr(importlib.import_module(module), name)
        longest = max(rows.lengths)
        out = function(query, key, value, rows.ends, rows.ends, longest, longest)
        return out[0] if isinstance(out, tuple) else out  # some versions hand out the log-sum as well

    return attend


def _xformers(query: Tensor, key: Tensor, value: Tensor, rows: Ragged) -> Tensor:
    """`packed_attention_reference` by xformers."""
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal(rows.lengths, query.device)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


@functools.lru_cache(maxsize=8)  # made anew it would copy to the GPU in every block
def _block_diagonal(lengths: tuple[int, ...], device: torch.device):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(list(lengths), device=device)


class Backend(NamedTuple):
    """What a backend's name stands for.

    Attributes:
        needs: the package that must be there, and how to get it; None: none.
        packed: its `packed_attention_reference`, on a GPU; None: it has none.
    """

    needs: tuple[str, str] | None = None
    packed: Packed | None = None


_KERNELS = ("kernels", "pip install kernels")
_FLASH = ("flash_attn", "pip install flash-attn --no-build-isolation")
_SAGE = ("sageattention", "pip install sageattention")
_TORCH_VARLEN = _varlen("torch.nn.attention.varlen", "varlen_attn")  # FlashAttention, as PyTorch brings it along
BACKENDS: dict[str, Backend] = {
    "auto": Backend(),
    "native": Backend(packed=_TORCH_VARLEN),
    "_native_flash": Backend(packed=_TORCH_VARLEN),
    "_native_efficient": Backend(),
    "_native_math": Backend(),
    "_native_cudnn": Backend(),
    "flex": Backend(),
    "flash": Backend(_FLASH, _varlen("flash_attn", "flash_attn_varlen_func")),
    "flash_hub": Backend(_KERNELS),
    "flash_4_hub": Backend(_KERNELS),
    "_flash_3": Backend(
        ("flash_attn_interface", "build FlashAttention-3 from source, or take _flash_3_hub"),
        _varlen("flash_attn_interface", "flash_attn_varlen_func"),
    ),
    "_flash_3_hub": Backend(_KERNELS),
    "sage": Backend(_SAGE),
    "sage_hub": Backend(_KERNELS),
    "xformers": Backend(("xformers", "pip install xformers"), _xformers),
}
DOWNLOADS = tuple(name for name, backend in BACKENDS.items() if backend.needs == _KERNELS)  # kernels, from a hub
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "xformers")  # exact, nothing to download
TEXT_TOKENS = 64  # a usual prompt's
TAKES_BIAS = ("auto", "native", "_native_efficient", "_native_math", "_native_cudnn", "flex", "xformers")


def available(name: str) -> bool:
    """Whether the package that a backend needs is installed."""
    needs = BACKENDS[name].needs
    return needs is None or importlib.util.find_spec(needs[0]) is not None


def packed_kernel(query: Tensor, backend: str | None = None) -> Packed | None:
    """What attends packed rows in place of ``backend``, where it would attend ``query`` (B, N, H, E).

    Args:
        backend: a backend's name; None: the active one.

    Returns:
        None where rows are attended one by one: on a CPU, in fp32, or by a backend without a packed form.
    """
    import torch
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] % 8:
        return None
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    if backend == "native":  # chooses between kernels itself, and only one of them has a packed form
        rows = query.transpose(1, 2)
        if torch._fused_sdp_choice(rows, rows, rows) != torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
            return None
    return BACKENDS.get(backend, Backend()).packed


def ragged(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, biased: bool) -> str:
    """How rows of different lengths are attended at ``shape`` (B, N, H, E), in words."""
    import torch

    packed = not biased and packed_kernel(torch.empty(shape, dtype=dtype, device=device), name) is not None
    return "ragged batches packed" if packed else "ragged batches row by row"


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
        package, remedy = BACKENDS[name].needs
        raise UserError(f"attention {name} needs the package {package}: {remedy}")
    if biased and name not in TAKES_BIAS:
        raise UserError(
            f"attention {name} can't weigh keys, which this model asks of it; choose from {', '.join(TAKES_BIAS)}"
        )


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run with an attention backend. The choice is process-wide, so it is put back."""
    from diffusers.models.attention_dispatch import attention_backend

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(attention_backend(name))
        except (RuntimeError, ValueError, ImportError) as error:
            raise UserError(f"attention {name}: {error}") from error
        yield


def lines() -> Iterable[str]:
    """What is there and what to install for more, a line for each backend."""
    for name, (needs, packed) in BACKENDS.items():
        packs = "" if packed is None else "; packs ragged batches on a GPU"
        yield f"{name}: available{packs}" if available(name) else f"{name}: missing; {needs[1]}"
