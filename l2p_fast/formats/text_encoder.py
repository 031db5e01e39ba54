"""A folder's text encoders and tokenizers, judged by their files alone. Loads no torch and no transformers.

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

_DEPTH, _HEADS, _WIDTH = (1, 1000), (1, 1024), (1, 1 << 16)
_CAUSAL = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": _WIDTH,
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": _DEPTH,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "max_position_embeddings": (1, 1 << 24),
}
_PLAIN = {"hidden_act": "silu", "use_sliding_window": False}
_CLIP = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": _WIDTH,
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": _DEPTH,
    "num_attention_heads": _HEADS,
    "max_position_embeddings": (2, 1 << 16),
    "projection_dim": _WIDTH,
    "eos_token_id": (0, 1 << 20),
}
_T5 = {
    "vocab_size": (1, 1 << 20),
    "d_model": _WIDTH,
    "d_kv": (1, 1 << 12),
    "d_ff": (1, 1 << 18),
    "num_layers": _DEPTH,
    "num_heads": _HEADS,
    "relative_attention_num_buckets": (2, 1 << 16),
    "relative_attention_max_distance": (2, 1 << 20),
}


class Kind(NamedTuple):
    """A kind of text encoder.

    Attributes:
        types: what its config.json calls it.
        sizes: whole numbers of its configuration -> (lowest, highest).
        epsilon: name of its norms' epsilon.
        fixed: settings that have one value -> it.
        choices: settings that have one of several values -> them.
        tokenizer: "qwen", "clip" or "t5".
        template: whether prompts are written with the tokenizer's chat template.
        title: as it is written.
        owner: whose folder to give instead of another's.
        prefixes: of its names in files; taken off.
        others: beginnings of names that are not read.
    """

    types: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int]]
    epsilon: str
    fixed: Mapping[str, Any]
    choices: Mapping[str, tuple[str, ...]]
    tokenizer: str
    template: bool
    title: str
    owner: str
    prefixes: tuple[str, ...]
    others: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "qwen3": Kind(
        ("qwen3",), _CAUSAL | {"head_dim": (2, 1024)}, "rms_norm_eps", _PLAIN | {"attention_bias": False}, {}, "qwen",
        True, "Qwen3", "Z-Image", ("model.",), ("lm_head.",),  # the causal model's last layer is not needed
    ),
    "qwen2_5_vl": Kind(
        ("qwen2_5_vl", "qwen2_5_vl_text"), _CAUSAL, "rms_norm_eps", _PLAIN, {}, "qwen", False, "Qwen2.5-VL",
        "Qwen-Image", ("model.language_model.", "model."), ("lm_head.", "visual."),
    ),
    "clip": Kind(
        ("clip_text_model",), _CLIP, "layer_norm_eps", {}, {"hidden_act": ("quick_gelu", "gelu")}, "clip", False,
        "CLIP", "FLUX.1", ("text_model.",), ("text_projection.", "embeddings.position_ids"),
    ),
    "clip_projected": Kind(
        ("clip_text_model",), _CLIP, "layer_norm_eps", {}, {"hidden_act": ("quick_gelu", "gelu")}, "clip", False,
        "CLIP", "Stable Diffusion 3.5", ("text_model.",), ("embeddings.position_ids",),
    ),
    "t5": Kind(
        ("t5",), _T5, "layer_norm_epsilon", {}, {"feed_forward_proj": ("gated-gelu", "relu")}, "t5", False,
        "T5", "FLUX.1 or Stable Diffusion 3.5", (), ("decoder.", "lm_head.", "encoder.embed_tokens."),
    ),
}  # fmt: skip
_TOKENIZERS = {"qwen": ("Qwen2Tokenizer", "PreTrainedTokenizer"), "clip": ("CLIPTokenizer",), "t5": ("T5Tokenizer",)}
_TITLES = {"qwen": "Qwen's tokenizer", "clip": "CLIP's tokenizer", "t5": "T5's tokenizer"}


class EncoderFiles(NamedTuple):
    """The configuration (arguments of the library's) and the tensors by the library's names, `Kind.prefixes` off."""

    config: dict[str, Any]
    tensors: dict[str, Stored]


def open_encoder(folder: Path, part: str = "text_encoder", kind: str = "qwen3") -> EncoderFiles:
    """Open ``folder``/``part``, a text encoder of one of `KINDS`.

    Whoever makes the encoder compares its tensors with what their shapes must be.

    Raises:
        UserError: not there, damaged, or of another kind.
    """
    known = KINDS[kind]
    opened = open_tensors(_part(folder, part, known), part)
    path = folder / part
    config = _encoder_config(opened.config, path / "config.json", known)
    found = attach_scales(opened.tensors, opened.metadata, path)
    tensors: dict[str, Stored] = {}
    for name, where in found.items():
        prefix = next((p for p in known.prefixes if name.startswith(p)), "")
        bare = name.removeprefix(prefix)
        if bare in tensors:
            raise UserError(f"{path} has {bare} twice ({tensors[bare].name} and {name}); {AGAIN}")
        if not bare.startswith(known.others):
            tensors[bare] = where
    return EncoderFiles(config, tensors)


def _part(folder: Path, name: str, kind: Kind) -> Path:
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder} has no folder {name}; for a {kind.title} text encoder give {kind.owner}'s folder, or the like, "
            "with text_encoder/ and tokenizer/"
        )
    return folder / name


def _encoder_config(config: Mapping[str, Any], path: Path, kind: Kind) -> dict[str, Any]:
    if not config:
        raise UserError(f"{path} is missing; {AGAIN}")
    if config.get("model_type") not in kind.types:
        came, give = config.get("model_type"), f"give {kind.owner}'s text encoder"
        raise UserError(f"{path} is of a {came!r:.40}, not a {kind.types[0]}; {give}")
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    checked: dict[str, Any] = {}
    for name, (low, high) in kind.sizes.items():
        checked[name] = _number(config.get(name), name, low, high, path, int)
    width, heads = checked.get("hidden_size", 0), checked.get("num_attention_heads", 1)
    if "head_dim" not in checked and width % heads:
        raise UserError(f"{path}: {width} channels can't be cut into {heads} heads; {AGAIN}")
    checked[kind.epsilon] = _number(config.get(kind.epsilon), kind.epsilon, 0, 0.1, path, float)
    if "num_key_value_heads" in kind.sizes:
        checked["rope_parameters"] = _rope(config, path, kind)
    for name, wanted in kind.fixed.items():
        if config.get(name, wanted) != wanted:
            raise UserError(f"{path}: {name} is {config[name]!r:.40}, {kind.owner}'s text encoder has {wanted!r}")
    for name, choices in kind.choices.items():
        checked[name] = config.get(name)
        if checked[name] not in choices:
            raise UserError(f"{path}: {name} must be one of {few(choices)}, got {checked[name]!r:.40}; {AGAIN}")
    return checked


def _rope(config: Mapping[str, Any], path: Path, kind: Kind) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    names = ("default", "mrope") if kind.tokenizer == "qwen" and "head_dim" not in kind.sizes else ("default",)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) not in names:
        raise UserError(f"{path}: its RoPE is not its model's own ({rope!r:.60}); get {kind.owner}'s text encoder")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    found = {"rope_type": "default", "rope_theta": _number(theta, "rope_theta", 1, 1e12, path, float)}
    if "mrope" in names:
        parts = rope.get("mrope_section")
        if not isinstance(parts, list) or len(parts) != 3:
            raise UserError(f"{path}: mrope_section must be three numbers, got {parts!r:.40}; {AGAIN}")
        found["mrope_section"] = [_number(part, "mrope_section", 1, 1024, path, int) for part in parts]
    return found


def _number(value: Any, name: str, low: float, high: float, path: Path, kind: type) -> Any:
    if type(value) not in ((int,) if kind is int else (int, float)) or not low <= value <= high:
        raise UserError(f"{path}: {name} must be a number from {low:g} to {high:g}, got {value!r:.40}; {AGAIN}")
    return kind(value)


def compare_encoder(files: EncoderFiles, wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Name every tensor that is missing, unexpected or misshapen against ``wanted``.

    Raises:
        UserError: there are such.
    """
    if told := differences(files.tensors, wanted):
        raise UserError(f"{path} is not the model that its config.json tells: {told}; {AGAIN}")


def check_tokenizer(folder: Path, part: str = "tokenizer", kind: str = "qwen3") -> Path:
    """``folder``/``part``, the tokenizer of one of `KINDS`: its files there and fit to be handed to the library.

    Raises:
        UserError: a file is missing or damaged, or its configuration names files or another tokenizer.
    """
    known = KINDS[kind]
    path = _part(folder, part, known)
    config = load_json(path / "tokenizer_config.json")
    if not (path / "tokenizer.json").is_file():
        lost = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
        if lost or known.tokenizer == "t5":
            other = "" if known.tokenizer == "t5" else " (or vocab.json and merges.txt)"
            raise UserError(f"{path} lacks tokenizer.json{other}; {AGAIN}")
    for name in ("tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).exists():
            load_json(path / name, TOKENIZER_LIMIT)
    classes, title = _TOKENIZERS[known.tokenizer], _TITLES[known.tokenizer]
    named = str(config.get("tokenizer_class", classes[0]))
    if named.removesuffix("Fast") not in classes and named != "TokenizersBackend":
        raise UserError(f"{path} holds a {named:.40}, not {title}; give {known.owner}'s tokenizer folder")
    strange = [k for k, value in config.items() if value and re.search(r"_files?$|^(vocab|merges|init_inputs)$", k)]
    if strange:
        raise UserError(f"{path}/tokenizer_config.json names files of its own ({few(strange)}); get another version")
    template = path / "chat_template.jinja"
    if known.template and not config.get("chat_template") and not template.is_file():
        raise UserError(
            f"{path} has no chat template (chat_template.jinja, or in tokenizer_config.json), which prompts are "
            f"written with; {AGAIN}"
        )
    if template.is_file() and template.stat().st_size > TEMPLATE_LIMIT:
        raise UserError(f"{template} is over 1 MB, which is no chat template; {AGAIN}")
    return path
