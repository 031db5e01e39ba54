"""l2p_fast: latent text-to-image transformers as pixel-space ones, sampled and trained in little memory."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Imported on first use: `import l2p_fast` alone loads neither torch nor diffusers.
_LAZY = {"L2PTransformer2DModel": ".model", "L2PPipeline": ".pipeline", "DetailerHead": ".detailer"}
__all__ = ["DetailerHead", "L2PPipeline", "L2PTransformer2DModel"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
