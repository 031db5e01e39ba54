"""Weights -> models: read straight onto the device in the wanted dtype, quantized on the way."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError, few
from .formats.changes import Change
from .formats.checkpoint import Checkpoint
from .formats.lora import read_lora
from .formats.text_encoder import check_tokenizer, open_encoder
from .formats.values import default_dtype, fill, is_finite
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


def load_lora(model: nn.Module, path: str | os.PathLike, scale: float = 1.0, adapter: str | None = None) -> int:
    """Apply a LoRA, LoHa, LoKr or DoRA of any known layout (see `formats.lora.read_lora`). Returns the layers changed.

    Args:
        model: changed in place; on an error it is as it was.
        path: the .safetensors file (or a folder with one).
        scale: multiplies the change; of a plain one, -scale takes a merged one out again (up to rounding).
        adapter: None merges into the weights, computed in fp32; weights in 8 bits are rounded anew. A name lays an
            adapter of that name over the layers instead, in use by itself, which diffusers' ``set_adapters`` and the
            like know. It leaves the weights, whatever their bits, as they are.

    Raises:
        UserError: see `read_lora`; merging into weights that can't take it; a sum that is not finite.
    """
    from .models.adapters import add_adapter, shapes_of

    if not math.isfinite(scale):
        raise UserError(f"a LoRA's scale must be a finite number, got {scale}")
    changes = read_lora(shapes_of(model), path)
    if adapter is None:
        _merge(model, [(changes, scale)], f"{path}: merged at {scale:g}")
    else:
        add_adapter(model, changes, adapter)
        model.set_adapters([adapter], [scale])
    return len(changes)


def load_loras(model: nn.Module, files: Sequence[tuple[str | os.PathLike, float]]) -> list[tuple[int, int]]:
    """Apply several LoRAs (file, scale) at once, each to the weights as they are now.

    Weights of 16 bits and more take them merged, which costs nothing later; over those of fewer bits lie adapters, so
    that they need no rounding anew.

    Returns:
        for each file, the layers merged and those adapted.

    Raises:
        UserError: as `load_lora`.
    """
    from .models.adapters import add_adapter, fits_sums, is_rounded, shapes_of

    shapes, merged, counts, adapters = shapes_of(model), [], [], {}
    for number, (path, scale) in enumerate(files):
        changes = read_lora(shapes, path)
        layers = {name: model.get_submodule(name) for name in changes if f"{name}.weight" in shapes}
        over = [name for name, layer in layers.items() if is_rounded(layer) or not fits_sums(layer, changes[name])]
        merged.append(({name: change for name, change in changes.items() if name not in over}, scale))
        if over:
            adapters[f"lora_{number}"] = {name: changes[name] for name in over}, scale
        counts.append((len(changes) - len(over), len(over)))
    _merge(model, merged, "the LoRAs merged")
    for adapter, (changes, _) in adapters.items():
        add_adapter(model, changes, adapter)
    if adapters:
        model.set_adapters(list(adapters), [scale for _, scale in adapters.values()])
    return counts


@torch.no_grad()
def _merge(model: nn.Module, several: Sequence[tuple[Mapping[str, Change], float]], what: str) -> None:
    """Put changes by layer, each with its strength, into the weights of ``model``: all, or none.

    Raises:
        UserError: weights that can't take them; a sum that is not finite, of ``what``.
    """
    from .models.adapters import base_of, fits_sums, put_weight, weight_of

    loose = dict(model.named_parameters(recurse=False))
    of_layer: dict[str, list[tuple[Change, float]]] = {}
    for changes, scale in several:
        for name, change in changes.items():
            of_layer.setdefault(name, []).append((change, scale))
    layers = {name: base_of(model.get_submodule(name)) for name in of_layer if name not in loose}
    closed = [name for name, layer in layers.items() if not all(fits_sums(layer, c) for c, _ in of_layer[name])]
    if closed:
        lacking = any(change.bias is not None for name in closed for change, _ in of_layer[name])
        words = f"{'missing bias' if lacking else 'quantized weights'} of {few(closed)}"
        raise UserError(f"can't merge a LoRA into the {words}; give adapter=NAME, or merge before")

    def check(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        if not is_finite(values.to(dtype)):
            raise UserError(f"{what}, {name} would hold infinite values; try a lower scale")

    for apply in (False, True):  # all sums are looked at before the first is kept
        for name, changes in of_layer.items():
            layer = layers.get(name)
            if any(change.kind is not None for change, _ in changes):
                weight = loose[name].float() if layer is None else weight_of(layer, torch.float32)
                added = [change.added(weight, scale) for change, scale in changes if change.kind is not None]
                values = sum(added, weight)
                held = loose[name] if layer is None else layer.weight
                check(name, values, torch.float32 if hasattr(layer, "load_weight") else held.dtype)
                if apply and layer is None:
                    held.copy_(values)
                elif apply:
                    put_weight(layer, values)
            for change, scale in changes:
                if change.bias is not None:
                    values = layer.bias.float() + scale * change.bias.to(layer.bias.device)
                    check(f"{name}.bias", values, layer.bias.dtype)
                    if apply:
                        layer.bias.copy_(values)


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
