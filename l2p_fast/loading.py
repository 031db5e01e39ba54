"""Weights -> models: read straight onto the device in the wanted dtype, quantized on the way."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .formats.checkpoint import Checkpoint
from .formats.text_encoder import check_tokenizer, open_encoder
from .formats.values import default_dtype, fill
from .models.text import template_prompt
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
        products.quantize_blocks(model, quantize)
    checkpoint.fill(model, dtype, device)
    return model.eval()


def load_text_encoder(
    source: str | os.PathLike, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """The Qwen3 text encoder and its tokenizer, from a folder with ``text_encoder/`` and ``tokenizer/`` in it.

    Every tensor must be there and of its shape. Only safetensors and JSON are read; no code of the folder runs, and
    nothing is fetched.

    Args:
        source: the folder; or a hub id (``Tongyi-MAI/Z-Image-Turbo``), which is downloaded once and then read so.
        dtype: of the encoder's parameters; None: as stored.
        device: where they are put as they are read.

    Raises:
        UserError: a file or a tensor is missing, renamed, misshapen or damaged; a pickle; another model or tokenizer.
    """
    # By their own modules: transformers' automatic classes take seconds to import.
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding

    folder = _text_folder(source)
    files = open_encoder(folder)
    tokenizer = _load_tokenizer(check_tokenizer(folder), files.config["vocab_size"])
    dtype = dtype or default_dtype(files.tensors.values())
    config = Qwen3Config(**files.config, tie_word_embeddings=True, dtype=dtype)
    with torch.device("meta"):
        encoder = Qwen3Model(config)
    fill(encoder, files.tensors, dtype, device)
    encoder.rotary_emb = Qwen3RotaryEmbedding(config).to(device)  # its tables are in no file
    return encoder.eval(), tokenizer


def _text_folder(source: str | os.PathLike) -> Path:
    path, name = Path(source), os.fspath(source)
    if os.path.exists(path):
        return path
    # A mistyped path must not become a question to the hub.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or os.path.exists(path.parent):
        raise UserError(f"{name} does not exist; give a folder with text_encoder/ and tokenizer/ in it")
    from huggingface_hub import snapshot_download

    wanted = ["text_encoder/*.json", "text_encoder/*.safetensors"]
    wanted += [f"tokenizer/*.{end}" for end in ("json", "txt", "jinja")]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UserError(f"can't get {name} from the hub: {str(error).splitlines()[0]}") from error


def _load_tokenizer(path: Path, vocab_size: int) -> Any:
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(path, local_files_only=True)
        template_prompt(tokenizer, "a prompt")
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged one raises anything, also what Rust calls a panic
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"can't load the tokenizer {path}: {reason}; download or copy it again") from error
    if not 0 <= largest < vocab_size:
        raise UserError(
            f"{path} has {largest + 1:,} tokens, its text encoder {vocab_size:,}; they don't belong together"
        )
    return tokenizer
