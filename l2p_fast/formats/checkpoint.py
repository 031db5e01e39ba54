"""An opened checkpoint: any layout, our names, shapes, configuration; tensors are read only when asked for.

Opening loads no torch. Pickles are refused, nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, few
from .folder import open_tensors
from .header import parse_json
from .names import bare_names, to_ours
from .quantized import attach_scales
from .shapes import HEAD, Shape, Shapes, block_numbers, differences
from .sources import layout_of

if TYPE_CHECKING:
    import torch

METADATA_KEY = "l2p_config"
_OF_LORA = re.compile(r"\.lora[._]|\.dora_scale|\.(hada|lokr)_|^(lora|lycoris)_|\.diff(_b)?$|\.[wb]_norm$")


class Checkpoint:
    """An opened checkpoint: its tensors by our keys, read only when asked for.

    Args:
        path: a .safetensors file, a ``*.index.json``, a folder of shards, a diffusers model folder, or a pipeline
            folder (its ``transformer/``).

    Attributes:
        tensors: our key -> `Stored`. Of a LoRA: its own names.
        metadata: the file's own, text by name.
        layout: whose tensors they are, by their names.
        is_lora: whether it holds a LoRA.
        config: the constructor arguments that shapes don't tell, where the file or its folder keeps them.

    Raises:
        UserError: no such file, unreadable, truncated, a pickle, a missing shard, an unknown quantization, ...
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        raw, self.metadata, config = open_tensors(self.path)
        tensors = bare_names(raw, self.path)
        self.is_lora = any(_OF_LORA.search(name) for name in tensors)
        self.tensors, self.layout = tensors, layout_of(tensors)
        if not self.is_lora:
            self.tensors = attach_scales(tensors, self.metadata, self.path)
            if self.layout.other_names:
                self.tensors = to_ours(self.tensors, self.path)
        self.config = self._config(config)

    def _config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        try:
            own = parse_json(self.metadata.get(METADATA_KEY, "{}"))
            if not isinstance(own, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise UserError(
                f"{self.path}: its {METADATA_KEY} metadata is damaged ({error}); write the file again"
            ) from error
        try:
            return self.layout.checked({**own, **{name: value for name, value in config.items() if value is not None}})
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    @property
    def shapes(self) -> Shapes:
        """Our key -> shape."""
        return {key: where.shape for key, where in self.tensors.items()}

    # --- What it is --------------------------------------------------------------------------------------------------
    def kind(self) -> str:
        """``l2p``, ``latent`` (a source model), ``delta`` (only trained tensors), ``lora`` or ``other``."""
        names = self.tensors.keys()
        if self.is_lora:
            return "lora"
        layout = self.layout
        if any(name.startswith(layout.dropped) for name in names):
            return "latent"
        stacks = [block_numbers(stack, self.tensors) for stack in layout.stacks]
        head = any(name.startswith(HEAD) for name in names)
        embedder = any(name.startswith(layout.embedder) for name in names)
        if not any(stacks) and not head and not embedder:
            return "other"
        whole = all(len(blocks) == max(blocks, default=0) + 1 for blocks in stacks)
        if not whole or not (head or embedder):
            return "delta"
        inputs = [s[-1] for name, s in self.shapes.items() if name.startswith(layout.embedder) and len(s) == 2]
        if not head and any(n % 16 == 0 and n % 3 for n in inputs):
            return "latent"
        return "l2p"

    def demand(self, *kinds: str) -> None:
        """Refuse another kind of checkpoint than ``kinds``, naming the remedy."""
        kind = self.kind()
        if kind in kinds:
            return
        title = self.layout.source.title
        wanted = f"a {title} or L2P checkpoint" if "latent" in kinds else "a whole L2P checkpoint"
        first = few(where.name for where in self.tensors.values())
        raise UserError(f"{self.path} is " + {
            "latent": f"a latent {title} checkpoint, not {wanted}; make a pixel model of it first: "
                      "python -m l2p_fast.convert init FILE --res 1k --out NEW.safetensors",
            "delta": f"a training output ({len(self.tensors)} tensors), not {wanted}; merge it first: "
                     "python -m l2p_fast.convert merge FILE --base BASE.safetensors --out NEW.safetensors",
            "lora": f"a LoRA, not {wanted}; load its model, then l2p_fast.load_lora(model, FILE)",
            "l2p": f"a whole L2P checkpoint, not {wanted}",
            "other": f"not {wanted} (its tensors: {first}); give the transformer's file",
        }[kind])  # fmt: skip

    def compare(self, wanted: Mapping[str, Shape]) -> None:
        """Name every missing, unexpected or misshapen tensor (the first few and the count) against ``wanted``."""
        found = differences(self.tensors, wanted)
        if found:
            raise UserError(
                f"{self.path} is not the L2P model that its shapes tell: {found} of {len(wanted)} tensors; "
                "the file is incomplete or of another model"
            )

    def model_config(self, **overrides: Any) -> dict[str, Any]:
        """The constructor arguments that this file tells, with what its folder or metadata adds, and ``overrides``."""
        try:
            return self.layout.infer(self.shapes) | self.config | overrides
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def l2p_config(self, **overrides: Any) -> dict[str, Any]:
        """`model_config` of a file that is a whole L2P model, each tensor there and of its shape.

        Raises:
            UserError: it is another kind of checkpoint, or tensors are missing, unexpected or misshapen.
        """
        self.demand("l2p")
        config = self.model_config(**overrides)
        try:
            wanted = self.layout.shapes(config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        self.compare(wanted)
        return config

    # --- Its values --------------------------------------------------------------------------------------------------
    @property
    def default_dtype(self) -> torch.dtype:
        """See `values.default_dtype`."""
        from .values import default_dtype

        return default_dtype(self.tensors.values())

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype of `tensor` when none is given: the stored one, bfloat16 for a quantized weight."""
        from .values import DTYPES

        where = self.tensors[key]
        return DTYPES["BF16" if where.quantized else where.dtype]

    def tensor(self, key: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor of our key ``key``, dequantized and checked for NaN and Inf, in ``dtype`` (None: as stored)."""
        from .values import read_tensor

        return read_tensor(self.tensors[key], dtype or self.dtype_of(key), device)

    def chunks(self, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The rows of `tensor`, a piece at a time, on the CPU."""
        from .values import read_chunks

        return read_chunks(self.tensors[key], dtype)

    def fill(self, model: torch.nn.Module, dtype: torch.dtype | None, device: str | torch.device) -> None:
        """Give ``model`` (made on the meta device, of the shapes of `l2p_config`) its values; see `values.fill`."""
        from .values import fill

        fill(model, self.tensors, dtype, device)


def load_state(path: str | Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our key, CPU tensor) one by one from any supported file or folder, dequantized.

    ``dtype`` None keeps each tensor's stored dtype (bfloat16 for quantized weights).

    Raises:
        UserError: see `Checkpoint`.
    """
    checkpoint = Checkpoint(path)
    for key in checkpoint.tensors:
        yield key, checkpoint.tensor(key, dtype)


def patch_size_of(path: str | Path) -> int | None:
    """Patch size in pixels of a checkpoint, from its headers alone; None where they don't tell.

    Never raises: whoever loads the file looks again, and says what is wrong with it. Loads no torch.
    """
    try:
        checkpoint = Checkpoint(path)
        return checkpoint.layout.patch_size(checkpoint.l2p_config()) if checkpoint.kind() == "l2p" else None
    except UserError:
        return None


def hub_of(path: str | Path) -> str:
    """Hub id of a folder with the text encoders of a checkpoint's source; Z-Image's where its names don't tell."""
    try:
        return Checkpoint(path).layout.source.hub
    except UserError:
        return layout_of(()).source.hub
