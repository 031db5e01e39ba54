"""Weights -> models: read straight onto the device in the wanted dtype, quantized on the way."""

from __future__ import annotations

import os
from typing import Any

import torch

from .errors import UserError
from .formats.checkpoint import Checkpoint
from .models.zimage import L2PTransformer2DModel, build_empty
from .quantize import products


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    **overrides: Any,
) -> L2PTransformer2DModel:
    """Load an L2P checkpoint of any supported file layout (see `Checkpoint`) as a model in evaluation mode.

    The configuration comes from keys and shapes; ``config.json`` of a folder or our files' metadata add what shapes
    don't tell; ``overrides`` are constructor arguments that win over both. Host memory peaks at the model plus
    `values.CHUNK`-sized pieces when ``device`` is the CPU, at those pieces alone when it is another.

    Args:
        path: see `Checkpoint`.
        dtype: of every parameter; None: `Checkpoint.default_dtype`.
        device: where the parameters are put as they are read.
        quantize: "fp8" or "int8" puts the blocks' linear layers into 8 bits as they are read, so that they are nowhere
            whole in ``dtype``; `quantize.weight_error` then tells their relative error.
        overrides: constructor arguments.

    Raises:
        UserError: see `Checkpoint`; also missing, unexpected or misshapen tensors, NaN or Inf, a latent checkpoint, a
            training output that has yet to be merged, 8 bits that ``device`` can't do.
    """
    device = torch.device(device)
    if quantize is not None:
        products.check(quantize, device)
    checkpoint = Checkpoint(path)
    model = build_empty(checkpoint.l2p_config(**overrides))
    if quantize is not None:
        for _, block in model.blocks():
            products.quantize_block(block, quantize)
    checkpoint.fill(model, dtype, device)
    return model.eval()


def load_text_encoder(
    source: str | os.PathLike, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """The Qwen3 text encoder and the tokenizer of a folder or hub id with these two subfolders.

    Raises:
        UserError: they can't be loaded from there.
    """
    # By their own modules: transformers' automatic classes take seconds to import.
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    source = os.fspath(source)
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(source, subfolder="tokenizer")
        encoder = Qwen3Model.from_pretrained(source, subfolder="text_encoder", dtype=dtype)
        return encoder.to(device), tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"can't load a Qwen3 text encoder from {source}: {str(error).splitlines()[0]}") from error
