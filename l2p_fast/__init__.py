"""l2p_fast: latent text-to-image transformers as pixel-space ones, sampled and trained in little memory."""

from __future__ import annotations

import importlib
import logging

__version__ = "0.1.0"

# Imported on first use: `import l2p_fast` alone loads neither torch nor diffusers.
_LAZY = {
    "L2PTransformer2DModel": ".models.zimage",
    "L2PPipeline": ".sampling.pipeline",
    "DetailerHead": ".models.detailer",
}
__all__ = ["DetailerHead", "L2PPipeline", "L2PTransformer2DModel"]

# diffusers imports it wherever it is installed, and it warns of kernels that nothing here asks for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
