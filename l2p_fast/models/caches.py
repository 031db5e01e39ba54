"""diffusers' caches, which skip work that hardly changes between steps, over the blocks of our models.

Imported when a cache is enabled: diffusers' registry of blocks imports most of its models.
"""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, FBCBlockHook
from diffusers.hooks.hooks import HookRegistry
from torch import nn

from ..errors import UserError

CACHES = ("FirstBlockCache", "MagCache", "PyramidAttentionBroadcast", "TaylorSeerCache")


def check_cache(config: Any) -> str:
    """The name of the cache that ``config`` is of.

    Raises:
        UserError: it fits no model of ours.
    """
    name = type(config).__name__.removesuffix("Config")
    if name not in CACHES or getattr(config, "use_lite_mode", False):
        raise UserError(f"no {name} for this model; choose from {', '.join(CACHES)}, without a lite mode")
    return name


def check_unguided_steps(config: Any, cfg_batch: bool | str) -> None:
    """That the cache of ``config`` allows guidance at some steps alone.

    What a cache kept of an earlier step must be of the rows of this one, and of the step before. So the prompts run by
    themselves at every step, beside the negative ones or without them.

    Raises:
        UserError: both are to be one batch, or the cache counts steps from the first.
    """
    if cfg_batch is True:
        raise UserError("with a cache and a guidance_interval, the halves can't be one batch; leave cfg_batch out")
    if type(config).__name__ == "MagCacheConfig":
        raise UserError(
            "MagCache has a ratio for each step, so it can't begin at a step within; leave guidance_interval out, or "
            "take another cache"
        )


def register_block(kind: type[nn.Module], image: int, text: int | None = None) -> None:
    """Tell diffusers where a block's outputs have the image's stream, and the text's if there is one."""
    metadata = TransformerBlockMetadata(return_hidden_states_index=image, return_encoder_hidden_states_index=text)
    TransformerBlockRegistry.register(kind, metadata)


class _LastBlock(FBCBlockHook):
    """The first-block cache's hook of the last block, where that returns other streams than the first.

    FLUX.2's last block returns text and image as one sequence, that of SD 3.5 no text.
    """

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.state_manager.get_state()
        if not state.should_compute:
            return super().new_forward(module, *args, **kwargs)
        out = self.fn_ref.original_forward(*args, **kwargs)
        image, text = state.head_block_output
        after = out if isinstance(out, tuple) else (out[:, : text.shape[1]], out[:, text.shape[1] :])
        state.tail_block_residuals = (after[1] - image, 0 if after[0] is None else after[0] - text)
        return out


def watch_last_block(block: nn.Module) -> None:
    """Put our hook in the place of the first-block cache's own over the last of a model's two-stream blocks."""
    registry = HookRegistry.check_if_exists_or_initialize(block)
    states = registry.get_hook(_FBC_BLOCK_HOOK).state_manager
    registry.remove_hook(_FBC_BLOCK_HOOK, recurse=False)
    registry.register_hook(_LastBlock(states, is_tail=True), _FBC_BLOCK_HOOK)
