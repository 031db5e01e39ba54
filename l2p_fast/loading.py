"""Weights -> models: read straight onto the device in the wanted dtype, quantized on the way."""

from __future__ import annotations

import importlib
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
from .formats.sources import LAYOUTS
from .formats.text_encoder import KINDS, check_tokenizer, compare_encoder, open_encoder
from .formats.values import default_dtype, fill, is_finite
from .models.pixel import PixelModel, empty
from .models.text import template_prompt
from .quantize import products, stored
from .variants import SOURCES


def model_class(source: str) -> type[PixelModel]:
    """The pixel model of a row of `variants.SOURCES`."""
    module = importlib.import_module(f".models.{source}", __package__)
    return getattr(module, SOURCES[source].class_name)


def build_empty(config: Mapping[str, Any], source: str = "zimage") -> PixelModel:
    """The model of ``config``, of a row of `variants.SOURCES`, on the meta device; see `models.pixel.empty`."""
    return empty(model_class(source), config)


def load_model(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    **overrides: Any,
) -> PixelModel:
    """Load an L2P checkpoint of any supported file layout (see `Checkpoint`) as a model in evaluation mode.

    The configuration comes from keys and shapes; ``config.json`` of a folder or our files' metadata add what shapes
    don't tell; ``overrides`` are constructor arguments that win over both. Host memory peaks at the model plus
    `values.CHUNK`-sized pieces when ``device`` is the CPU, at those pieces alone when it is another.

    Args:
        path: see `Checkpoint`.
        dtype: of every parameter; None: `Checkpoint.default_dtype`.
        device: where the parameters are put as they are read.
        quantize: "fp8", "int8" or "nf4" puts the blocks' linear layers into 8 or 4 bits as they are read, so that they
            are nowhere whole in ``dtype``; `quantize.weight_error` then tells their relative error. "stored" leaves
            what the file has quantized as it is, which changes no value. None: nothing is in fewer bits.
        overrides: constructor arguments.

    Raises:
        UserError: see `Checkpoint`; also missing, unexpected or misshapen tensors, NaN or Inf, a latent checkpoint, a
            training output that has yet to be merged, fp8 where ``device`` has none.
    """
    device = torch.device(device)
    if quantize not in (None, "stored"):
        products.check(quantize, device)
    checkpoint = Checkpoint(path)
    model = build_empty(checkpoint.l2p_config(**overrides), checkpoint.layout.source.name)
    put_in_bits(model, checkpoint, quantize)
    checkpoint.fill(model, dtype, device)
    return model.eval()


def put_in_bits(model: PixelModel, checkpoint: Checkpoint, quantize: str | None) -> None:
    """Make the blocks of ``model`` (on the meta device) ready for weights in fewer bits; ``quantize`` as `load_model`.

    Raises:
        UserError: no layer has sizes that the type takes.
    """
    if quantize == "stored":
        stored.keep_blocks(model, checkpoint.tensors)
    elif quantize is not None:
        products.quantize_blocks(model, quantize)


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
    """The Qwen3 text encoder of a Z-Image folder and its tokenizer; see `load_text_encoders`."""
    return load_text_encoders(source, "zimage", dtype, device)[0]


def load_text_encoders(
    folder: str | os.PathLike,
    source: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> list[tuple[Any, Any]]:
    """The text encoders and tokenizers of a source model, from a folder with ``text_encoder/``, ``tokenizer/``, ...

    Every tensor must be there and of its shape. Only safetensors and JSON are read; no code of the folder runs, and
    nothing is fetched.

    Args:
        folder: the folder; or a hub id (``Tongyi-MAI/Z-Image-Turbo``), which is downloaded once and then read so.
        source: whose, a row of `variants.SOURCES`.
        dtype: of the encoders' parameters; None: as stored.
        device: where they are put as they are read.
        quantize: as `load_model`'s, of the linear layers whose sizes fit.

    Raises:
        UserError: a file or a tensor is missing, renamed, misshapen or damaged; a pickle; another model or tokenizer.
    """
    parts = LAYOUTS[source].text
    path = _text_folder(folder, [name for encoder, tokenizer, _ in parts for name in (encoder, tokenizer)])
    return [_load_encoder(path, *part, dtype, device, quantize) for part in parts]


# By their own modules: transformers' automatic classes take seconds to import. Of each kind of `text_encoder.KINDS`:
# the module, the configuration, the encoder and what makes its tables anew, which are in no file.
_CLASSES = {
    "qwen3": ("qwen3.modeling_qwen3", "Qwen3Config", "Qwen3Model"),
    "qwen2_5_vl": ("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLTextConfig", "Qwen2_5_VLTextModel"),
    "clip": ("clip.modeling_clip", "CLIPTextConfig", "CLIPTextModel"),
    "clip_projected": ("clip.modeling_clip", "CLIPTextConfig", "CLIPTextModelWithProjection"),
    "t5": ("t5.modeling_t5", "T5Config", "T5EncoderModel"),
}
_TOKENIZERS = {
    "qwen": ("qwen2.tokenization_qwen2", "Qwen2Tokenizer"),
    "clip": ("clip.tokenization_clip", "CLIPTokenizer"),
    "t5": ("t5.tokenization_t5", "T5Tokenizer"),
}


# Words of names. T5 casts what goes into these to the dtype of their weights, whatever that is.
IN_FULL = ("wo",)


def _load_encoder(
    folder: Path,
    part: str,
    tokenizer_part: str,
    kind: str,
    dtype: torch.dtype | None,
    device: str | torch.device,
    quantize: str | None,
) -> tuple[Any, Any]:
    files = open_encoder(folder, part, kind)
    module, config_name, name = _CLASSES[kind]
    module = importlib.import_module(f"transformers.models.{module}")
    config = getattr(module, config_name)(**files.config, tie_word_embeddings=True, dtype=dtype or torch.float32)
    try:
        with torch.device("meta"):
            encoder = getattr(module, name)(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{folder / part}: its config.json tells no model: {str(error).splitlines()[0]}") from error
    prefix = "text_model." if any(key.startswith("text_model.") for key in encoder.state_dict()) else ""
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # T5's, tied to its shared embeddings
    compare_encoder(files, {key.removeprefix(prefix): shape for key, shape in shapes.items()}, folder / part)
    tokenizer = _load_tokenizer(check_tokenizer(folder, tokenizer_part, kind), kind, files.config["vocab_size"])
    tensors = {key: files.tensors[key.removeprefix(prefix)] for key in shapes}
    if quantize == "stored":
        stored.keep_stored(encoder, tensors, skip=IN_FULL)
    elif quantize is not None:
        # The activations of language models have outliers, which 8 bits would drown.
        products.quantize_block(encoder, quantize, skip=IN_FULL, rounds_inputs=False)
    fill(encoder, tensors, dtype or default_dtype(files.tensors.values()), device)
    _make_tables(encoder, config, device)
    limit = files.config.get("max_position_embeddings", 0)
    if kind.startswith("clip") and not 2 <= tokenizer.model_max_length <= limit:
        raise UserError(
            f"{folder / tokenizer_part}: model_max_length must be from 2 to the encoder's {limit} positions, got "
            f"{tokenizer.model_max_length}"
        )
    return encoder.eval(), tokenizer


def _make_tables(encoder: Any, config: Any, device: str | torch.device) -> None:
    """What an encoder made without memory lacks and no file holds: tables, and tied embeddings."""
    for module in encoder.modules():
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(config).to(device)
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(config.max_position_embeddings, device=device)[None]
    if hasattr(encoder, "shared"):
        encoder.encoder.embed_tokens.weight = encoder.shared.weight


def _text_folder(source: str | os.PathLike, parts: Sequence[str]) -> Path:
    path, name = Path(source), os.fspath(source)
    if os.path.exists(path):
        return path
    # A mistyped path must not become a question to the hub.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or os.path.exists(path.parent):
        raise UserError(f"{name} does not exist; give a folder with {' and '.join(f'{p}/' for p in parts)} in it")
    from huggingface_hub import snapshot_download

    wanted = [f"{part}/*.{end}" for part in parts for end in ("json", "safetensors", "txt", "jinja")]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UserError(f"can't get {name} from the hub: {str(error).splitlines()[0]}") from error


def _load_tokenizer(path: Path, kind: str, vocab_size: int) -> Any:
    module, name = _TOKENIZERS[KINDS[kind].tokenizer]
    loader = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    try:
        tokenizer = loader.from_pretrained(path, local_files_only=True)
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
