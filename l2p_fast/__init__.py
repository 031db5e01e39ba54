"""l2p_fast: latent text-to-image transformers as pixel-space ones, sampled and trained in little memory."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys

__version__ = "0.1.0"

# Imported on first use: `import l2p_fast` alone loads neither torch nor diffusers.
_LAZY = {
    "DetailerHead": ".models.detailer",
    "Drawing": ".sampling.drawing",
    "L2PPipeline": ".sampling.pipeline",
    "L2PTransformer2DModel": ".models.zimage",
    "Request": ".sampling.request",
    "Session": ".sampling.session",
    "Setup": ".sampling.request",
    "load_lora": ".loading",
    "load_model": ".loading",
    "load_pipeline": ".sampling.pipeline",
}
__all__ = sorted(_LAZY)

# diffusers imports it wherever it is installed, and it warns of kernels that nothing here asks for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Introduce(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports our pipeline as soon as diffusers' pipelines are imported, and not before; it makes itself known there.

    ``DiffusionPipeline.from_pretrained`` looks a folder's class up among diffusers' own names and has no registry.
    """

    watched = "diffusers.pipelines.pipeline_utils"

    def find_spec(self, name, path=None, target=None):
        if name != self.watched:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        introduce()


def introduce() -> None:
    """Import the pipeline, unless that is under way."""
    if f"{__name__}.sampling.pipeline" not in sys.modules:
        importlib.import_module(".sampling.pipeline", __name__)


if _Introduce.watched in sys.modules:
    introduce()
else:
    sys.meta_path.insert(0, _Introduce())
