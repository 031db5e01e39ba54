"""What makes a command start quickly: two things that its imports would do for nothing."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

# transformers, diffusers and peft import these wherever they are installed, for what drawing an image never asks of
# them: other models' losses, processors of sound and of images, quantized linears that we have ourselves.
UNUSED = ("bitsandbytes", "librosa", "scipy", "sklearn", "soundfile", "torchao", "torchaudio", "torchvision")


def hide_unused() -> None:
    """Let nothing in this process find the packages `UNUSED`. For a command's own process, before it imports torch."""
    for name in UNUSED:
        sys.modules.setdefault(name, None)


@contextlib.contextmanager
def all_stays() -> Iterator[None]:
    """Import and load inside: nothing is looked through for garbage, now or later.

    What is imported stays to the end, millions of objects. Looking through them again and again, as more come, takes a
    quarter of the time of importing torch, transformers and diffusers.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
