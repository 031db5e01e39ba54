"""What waits in host memory while something else is at work, by diffusers' and accelerate's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .pipeline import L2PPipeline

BY_NEED = ("none", "text", "blocks")  # what "auto" chooses from, the fastest first
# Of free memory: for fragmentation and what the libraries take. Measured peaks were up to 7% above those told.
SPARE, CONTEXT = 0.08, 300_000_000


def pick(free: int | None, peaks: Callable[[], Mapping[str, int]]) -> tuple[str, str]:
    """What "auto" means: the first of `BY_NEED` that fits into ``free`` bytes, and why, as words.

    Args:
        free: None: a device without memory of its own.
        peaks: bytes on the device by the kind of offloading; counted only when they are needed.
    """
    if free is None:
        return "none", " (auto: this device shares the host's memory)"
    found = peaks()
    for how in BY_NEED:
        told = f"{found[how] / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free"
        if found[how] * (1 + SPARE) + CONTEXT <= free:
            return how, f" (auto: {told})"
    return BY_NEED[-1], f" (auto: {told}, which may not do; try fewer bits or a smaller size)"


def arrange(pipe: L2PPipeline, how: str, device: torch.device) -> None:
    """Let the parts of ``pipe`` wait as ``how`` says and compute on ``device``.

    "none" and "text" want the transformer there already; all that is to wait may be in host memory.
    """
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif how in ("text", "blocks"):
        from diffusers.hooks import apply_group_offloading  # imports much

        streams = device.type in ("cuda", "xpu")  # what comes next is fetched while something computes
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (encoder := getattr(pipe, name, None)) is not None:
                apply_group_offloading(encoder, device, offload_type="leaf_level", use_stream=streams)
        if how == "blocks":
            pipe.transformer.enable_group_offload(
                device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams
            )
