"""A folder's Qwen3 text encoder and tokenizer, judged by their files alone. Loads no torch and no transformers.

Only what is read here reaches the library: of a configuration the sizes, of a tokenizer's configuration nothing that
names a file. What a folder says of code (``auto_map``, attention kernels from a hub) is never looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, few
from .folder import open_tensors
from .header import AGAIN, Stored, load_json
from .quantized import attach_scales
from .shapes import differences

TOKENIZER_LIMIT = 64 << 20  # bytes of tokenizer.json; Qwen3's has 11 MB
TEMPLATE_LIMIT = 1 << 20  # bytes of a chat template

_SIZES = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 1 << 24),
}


class EncoderFiles(NamedTuple):
    """The configuration (arguments of a Qwen3Config) and the tensors by the names of a Qwen3Model."""

    config: dict[str, Any]
    tensors: dict[str, Stored]


def open_encoder(folder: Path) -> EncoderFiles:
    """Open ``folder``/text_encoder.

    Raises:
        UserError: not there, damaged, not a Qwen3, or a tensor is missing, unexpected or misshapen.
    """
    opened = open_tensors(_part(folder, "text_encoder"), "text_encoder")
    path = folder / "text_encoder"
    config = _encoder_config(opened.config, path / "config.json")
    found = attach_scales(opened.tensors, opened.metadata, path)
    tensors: dict[str, Stored] = {}
    for name, where in found.items():
        bare = name.removeprefix("model.")
        if bare in tensors:
            raise UserError(f"{path} has {bare} twice ({tensors[bare].name} and {name}); {AGAIN}")
        if bare != "lm_head.weight":  # the causal model's last layer, which is not needed
            tensors[bare] = where
    wanted = encoder_shapes(config)
    if told := differences(tensors, wanted):
        raise UserError(f"{path} is not the Qwen3 that its config.json tells: {told}; {AGAIN}")
    return EncoderFiles(config, {name: tensors[name] for name in wanted})


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder} has no folder {name}; for a Qwen3 text encoder give the folder with text_encoder/ and tokenizer/"
        )
    return folder / name


def _encoder_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if not config:
        raise UserError(f"{path} is missing; {AGAIN}")
    if config.get("model_type") != "qwen3":
        raise UserError(f"{path} is of a {config.get('model_type')!r:.40}, not a qwen3; give Z-Image's text encoder")
    checked: dict[str, Any] = {}
    for name, (low, high) in _SIZES.items():
        checked[name] = _number(config.get(name), name, low, high, path, int)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path}: its RoPE is not Qwen3's own ({rope!r:.60}); get Z-Image's text encoder")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    checked["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": _number(theta, "rope_theta", 1, 1e12, path, float),
    }
    checked["rms_norm_eps"] = _number(config.get("rms_norm_eps"), "rms_norm_eps", 0, 0.1, path, float)
    for name, wanted in {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}.items():
        if config.get(name, wanted) != wanted:
            raise UserError(f"{path}: {name} is {config[name]!r:.40}, Z-Image's text encoder has {wanted!r}")
    return checked


def _number(value: Any, name: str, low: float, high: float, path: Path, kind: type) -> Any:
    if type(value) not in ((int,) if kind is int else (int, float)) or not low <= value <= high:
        raise UserError(f"{path}: {name} must be a number from {low:g} to {high:g}, got {value!r:.40}; {AGAIN}")
    return kind(value)


def encoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the Qwen3Model of ``config``."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    block = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {"embed_tokens.weight": (config["vocab_size"], width), "norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def check_tokenizer(folder: Path) -> Path:
    """``folder``/tokenizer, its files there and fit to be handed to the library.

    Raises:
        UserError: a file is missing or damaged, or its configuration names files or another tokenizer.
    """
    path = _part(folder, "tokenizer")
    config = load_json(path / "tokenizer_config.json")
    if not (path / "tokenizer.json").is_file():
        lost = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
        if lost:
            raise UserError(f"{path} lacks tokenizer.json (or vocab.json and merges.txt); {AGAIN}")
    for name in ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).exists():
            load_json(path / name, TOKENIZER_LIMIT)
    kind = str(config.get("tokenizer_class", "Qwen2Tokenizer"))
    if kind.removesuffix("Fast") not in ("Qwen2Tokenizer", "PreTrainedTokenizer") and kind != "TokenizersBackend":
        raise UserError(f"{path} holds a {kind:.40}, not Qwen's tokenizer; give Z-Image's tokenizer folder")
    strange = [k for k, value in config.items() if value and re.search(r"_files?$|^(vocab|merges|init_inputs)$", k)]
    if strange:
        raise UserError(f"{path}/tokenizer_config.json names files of its own ({few(strange)}); get another version")
    template = path / "chat_template.jinja"
    if not config.get("chat_template") and not template.is_file():
        raise UserError(
            f"{path} has no chat template (chat_template.jinja, or in tokenizer_config.json), which prompts are "
            f"written with; {AGAIN}"
        )
    if template.is_file() and template.stat().st_size > TEMPLATE_LIMIT:
        raise UserError(f"{template} is over 1 MB, which is no chat template; {AGAIN}")
    return path
