"""The source models' files: which model the tensors are of, and its shapes <-> its configuration, by arithmetic.

One `Layout` for each row of `variants.SOURCES`; `shapes.py` has Z-Image's arithmetic and the head's. Names and
arguments are those of diffusers' classes. Loads no torch and builds no model, so that a stranger's file is judged
before anything is made for it.

Letters: D = model width, E = head width, P = patch size in pixels, M = D times the feed-forward's ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, few
from ..variants import OF_PATCH, SOURCES, Source
from . import shapes as zimage
from .shapes import HEAD, Shape, Shapes, count_blocks, head_shapes, head_width

_SHARED = {"x0_floor": (float, 1e-4, 1.0), "text_tokens": (int, 1, 4096)}
_RATIO, _SINUSOID = 4, 256  # of the feed-forward layers to D; channels of the sinusoid of time


@dataclass(frozen=True)
class Layout:
    """What is known of a source's files.

    Attributes:
        source: its row in `variants.SOURCES`.
        marks: beginnings of names that only its files have.
        stacks: the main stacks of blocks.
        embedder: beginning of the patch embedding's names.
        dropped: beginnings of what a latent model has and a pixel model has not.
        not_in_shapes: constructor arguments that no key or shape tells -> (type, lowest, highest).
        lists: those of them that are lists, and of how many numbers.
        text: the folder's text encoders: (folder, tokenizer's folder, kind of `text_encoder.KINDS`).
        infer: our keys and shapes -> constructor arguments.
        shapes: constructor arguments -> our keys and shapes.
        other_names: whether its files come in the other layouts of `names.TABLE`, too.
    """

    source: Source
    marks: tuple[str, ...]
    stacks: tuple[str, ...]
    embedder: str
    dropped: tuple[str, ...]
    not_in_shapes: Mapping[str, tuple[type, float, float]]
    lists: Mapping[str, int]
    text: tuple[tuple[str, str, str], ...]
    infer: Callable[[Mapping[str, Shape]], dict[str, Any]]
    shapes: Callable[[Mapping[str, Any]], Shapes]
    other_names: bool = False

    @property
    def pixel_parts(self) -> tuple[str, ...]:
        """Beginnings of what a latent model has in no usable form."""
        return (self.embedder, HEAD)

    def checked(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What ``config`` says of `not_in_shapes`; see `shapes.checked_numbers`."""
        return zimage.checked_numbers(config, self.not_in_shapes, self.lists)

    def patch_size(self, config: Mapping[str, Any]) -> int:
        """Side of a patch in pixels."""
        return config["all_patch_size"][0] if "all_patch_size" in config else config["pixel_patch_size"]

    def in_pixels(self, config: Mapping[str, Any], patch: int, width: float) -> dict[str, Any]:
        """``config``, of a latent model too, as that of a pixel model of ``patch`` and head ``width``."""
        if "all_patch_size" in config:
            sizes = {"all_patch_size": (patch,), "all_f_patch_size": (1,), "in_channels": 3}
        else:
            sizes = {"pixel_patch_size": patch}
        return {**config, **sizes, "head_width": width}


def layout_of(names: Iterable[str]) -> Layout:
    """Whose tensors these are; Z-Image's where no name tells."""
    names = list(names)
    for layout in LAYOUTS.values():
        if any(name.startswith(layout.marks) for name in names):
            return layout
    return LAYOUTS["zimage"]


def infer_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Constructor arguments of the transformer from our keys and shapes alone, of a latent model too.

    Raises:
        UserError: a tensor that tells a size is missing or misshapen, or blocks are.
    """
    return layout_of(shapes).infer(shapes)


# --- Blocks of names -------------------------------------------------------------------------------------------------
def _linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _linears(names: Iterable[str], out: int, into: int, bias: bool = True) -> Shapes:
    found: Shapes = {}
    for name in names:
        found |= _linear(name, out, into, bias)
    return found


def _norms(names: Iterable[str], width: int) -> Shapes:
    return {f"{name}.weight": (width,) for name in names}


def _mlp(name: str, dim: int) -> Shapes:
    return _linear(f"{name}.net.0.proj", _RATIO * dim, dim) | _linear(f"{name}.net.2", dim, _RATIO * dim)


_OF_IMAGE, _OF_TEXT = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_QK, _ADDED_QK = ("attn.norm_q", "attn.norm_k"), ("attn.norm_added_q", "attn.norm_added_k")


def _joint_attention(dim: int, head: int, bias: bool = True, text_out: bool = True) -> Shapes:
    """Attention of two streams; ``head`` 0: without query-key norm."""
    found = _linears((*_OF_IMAGE, *_OF_TEXT, "attn.to_out.0"), dim, dim, bias)
    found |= _linear("attn.to_add_out", dim, dim, bias) if text_out else {}
    return found | (_norms((*_QK, *_ADDED_QK), head) if head else {})


def _stack(name: str, count: int, block: Shapes) -> Shapes:
    return {f"{name}.{i}.{key}": shape for i in range(count) for key, shape in block.items()}


def _time_text(dim: int, embedders: Mapping[str, int]) -> Shapes:
    """MLPs of two layers under ``time_text_embed``, by their names and input widths."""
    found: Shapes = {}
    for name, width in embedders.items():
        found |= _linear(f"time_text_embed.{name}.linear_1", dim, width)
        found |= _linear(f"time_text_embed.{name}.linear_2", dim, dim)
    return found


# --- Reading sizes ---------------------------------------------------------------------------------------------------
_FIRST_NORM = "transformer_blocks.0.attn.norm_q.weight"


class _Sizes:
    """Shapes as they tell sizes; what is missing or misshapen is named together."""

    def __init__(self, shapes: Mapping[str, Shape], wanted: Mapping[str, int]):
        lost = [key for key, rank in wanted.items() if len(shapes.get(key, ())) != rank or 0 in shapes[key]]
        if lost:
            raise UserError(
                f"{len(lost)} missing or misshapen ({few(lost)}), which tell the model's sizes; get the file again"
            )
        self.of = shapes

    def heads(self, dim: int, head: int) -> dict[str, int]:
        return {"attention_head_dim": head, "num_attention_heads": max(1, dim // head)}

    def pixels(self, embedder: str, dim: int) -> dict[str, Any]:
        """What the patch embedding and the head tell; nothing for a latent model."""
        head = {key.removeprefix(HEAD): shape for key, shape in self.of.items() if key.startswith(HEAD)}
        patch = math.isqrt(self.of[f"{embedder}weight"][1] // 3)
        if not head or patch not in OF_PATCH:
            return {}
        return {"pixel_patch_size": patch, "head_width": head_width(head, patch, dim)}


def _pixel_shapes(config: Mapping[str, Any], embedder: str, dim: int, bias: bool = True) -> Shapes:
    """Patch embedding and head, of a ``config`` whose sizes a model can have."""
    patch = config.get("pixel_patch_size")
    if patch not in OF_PATCH:
        raise UserError(f"no L2P model has patches of {patch}; the known ones are {few(OF_PATCH)}")
    head = head_shapes(patch, dim, config.get("head_width", 1.0))
    found = _linear(embedder.removesuffix("."), dim, 3 * patch * patch, bias)
    return found | {HEAD + key: shape for key, shape in head.items()}


def _dim(config: Mapping[str, Any]) -> tuple[int, int]:
    """(D, E)."""
    return config["num_attention_heads"] * config["attention_head_dim"], config["attention_head_dim"]


def _axes(head: int) -> tuple[int, int, int]:
    """How FLUX.1 and Qwen-Image share a head's channels: 1/8, 7/16, 7/16, each even. 128 -> (16, 56, 56)."""
    side = 2 * (head * 7 // 32)
    return head - 2 * side, side, side


# --- FLUX.1 ----------------------------------------------------------------------------------------------------------
_FLUX_STACKS = ("transformer_blocks", "single_transformer_blocks")


def _infer_flux(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    text = "time_text_embed.text_embedder.linear_1.weight"
    sizes = _Sizes(shapes, {"x_embedder.weight": 2, "context_embedder.weight": 2, text: 2, _FIRST_NORM: 1})
    dim, (head,) = shapes["x_embedder.weight"][0], shapes[_FIRST_NORM]
    return {
        "num_layers": count_blocks(_FLUX_STACKS[0], shapes),
        "num_single_layers": count_blocks(_FLUX_STACKS[1], shapes),
        **sizes.heads(dim, head),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes[text][1],
        "guidance_embeds": any(key.startswith("time_text_embed.guidance_embedder.") for key in shapes),
        "axes_dims_rope": _axes(head),
        **sizes.pixels("x_embedder.", dim),
    }


def _flux_shapes(config: Mapping[str, Any]) -> Shapes:
    dim, head = _dim(config)
    embedders = {"timestep_embedder": _SINUSOID, "text_embedder": config["pooled_projection_dim"]}
    embedders |= {"guidance_embedder": _SINUSOID} if config["guidance_embeds"] else {}
    double = _linears(("norm1.linear", "norm1_context.linear"), 6 * dim, dim)
    double |= _joint_attention(dim, head) | _mlp("ff", dim) | _mlp("ff_context", dim)
    single = _linear("norm.linear", 3 * dim, dim) | _linear("proj_mlp", _RATIO * dim, dim)
    single |= _linear("proj_out", dim, (1 + _RATIO) * dim) | _linears(_OF_IMAGE, dim, dim) | _norms(_QK, head)
    return (
        _pixel_shapes(config, "x_embedder.", dim)
        | _linear("context_embedder", dim, config["joint_attention_dim"])
        | _time_text(dim, embedders)
        | _stack(_FLUX_STACKS[0], config["num_layers"], double)
        | _stack(_FLUX_STACKS[1], config["num_single_layers"], single)
    )


# --- FLUX.2 ----------------------------------------------------------------------------------------------------------
def _infer_flux2(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    time = "time_guidance_embed.timestep_embedder.linear_1.weight"
    inner = "transformer_blocks.0.ff.linear_in.weight"
    wanted = {"x_embedder.weight": 2, "context_embedder.weight": 2, time: 2, inner: 2, _FIRST_NORM: 1}
    sizes = _Sizes(shapes, wanted)
    dim, (head,) = shapes["x_embedder.weight"][0], shapes[_FIRST_NORM]
    return {
        "num_layers": count_blocks(_FLUX_STACKS[0], shapes),
        "num_single_layers": count_blocks(_FLUX_STACKS[1], shapes),
        **sizes.heads(dim, head),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes[time][1],
        "mlp_ratio": shapes[inner][0] / 2 / dim,
        "guidance_embeds": any(key.startswith("time_guidance_embed.guidance_embedder.") for key in shapes),
        "axes_dims_rope": (head // 4,) * 4,
        **sizes.pixels("x_embedder.", dim),
    }


def _flux2_shapes(config: Mapping[str, Any]) -> Shapes:
    dim, head = _dim(config)
    inner, bare = int(dim * config["mlp_ratio"]), {"bias": False}
    double = _joint_attention(dim, head, **bare)
    for name in ("ff", "ff_context"):
        double |= _linear(f"{name}.linear_in", 2 * inner, dim, **bare) | _linear(
            f"{name}.linear_out", dim, inner, **bare
        )
    single = _linear("attn.to_qkv_mlp_proj", 3 * dim + 2 * inner, dim, **bare) | _norms(_QK, head)
    single |= _linear("attn.to_out", dim, dim + inner, **bare)
    found = _pixel_shapes(config, "x_embedder.", dim, **bare)
    found |= _linear("context_embedder", dim, config["joint_attention_dim"], **bare)
    for name in ("timestep_embedder", *(("guidance_embedder",) if config["guidance_embeds"] else ())):
        found |= _linear(f"time_guidance_embed.{name}.linear_1", dim, config["timestep_guidance_channels"], **bare)
        found |= _linear(f"time_guidance_embed.{name}.linear_2", dim, dim, **bare)
    for name, sets in (("double_stream_modulation_img", 2), ("double_stream_modulation_txt", 2),
                       ("single_stream_modulation", 1)):  # fmt: skip
        found |= _linear(f"{name}.linear", 3 * sets * dim, dim, **bare)
    found |= _stack(_FLUX_STACKS[0], config["num_layers"], double)
    return found | _stack(_FLUX_STACKS[1], config["num_single_layers"], single)


# --- Qwen-Image ------------------------------------------------------------------------------------------------------
def _infer_qwen_image(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    if any(key.startswith("time_text_embed.addition_t_embedding.") for key in shapes):
        raise UserError("it is a Qwen-Image for layers, which has a second time; give one for images")
    sizes = _Sizes(
        shapes, {"img_in.weight": 2, "txt_in.weight": 2, _FIRST_NORM: 1}
    )  # fmt: skip
    dim, (head,) = shapes["img_in.weight"][0], shapes[_FIRST_NORM]
    return {
        "num_layers": count_blocks("transformer_blocks", shapes),
        **sizes.heads(dim, head),
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": _axes(head),
        **sizes.pixels("img_in.", dim),
    }


def _qwen_image_shapes(config: Mapping[str, Any]) -> Shapes:
    dim, head = _dim(config)
    block = _linears(("img_mod.1", "txt_mod.1"), 6 * dim, dim) | _joint_attention(dim, head)
    block |= _mlp("img_mlp", dim) | _mlp("txt_mlp", dim)
    return (
        _pixel_shapes(config, "img_in.", dim)
        | _norms(("txt_norm",), config["joint_attention_dim"])
        | _linear("txt_in", dim, config["joint_attention_dim"])
        | _time_text(dim, {"timestep_embedder": _SINUSOID})
        | _stack("transformer_blocks", config["num_layers"], block)
    )


# --- Stable Diffusion 3.5 --------------------------------------------------------------------------------------------
def _infer_sd3(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    text, places = "time_text_embed.text_embedder.linear_1.weight", "pos_embed.pos_embed"
    sizes = _Sizes(shapes, {"pos_embed.proj.bias": 1, places: 3, "context_embedder.weight": 2, text: 2})
    (dim,), (head,) = shapes["pos_embed.proj.bias"], shapes.get(_FIRST_NORM, (64,))
    count = count_blocks("transformer_blocks", shapes)
    embedded = len(shapes.get("pos_embed.proj.weight", ())) == 2
    return {
        "num_layers": count,
        **sizes.heads(dim, head),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes[text][1],
        "pos_embed_max_size": math.isqrt(shapes[places][1]),
        "dual_attention_layers": tuple(
            i for i in range(count) if any(key.startswith(f"transformer_blocks.{i}.attn2.") for key in shapes)
        ),
        "qk_norm": "rms_norm" if _FIRST_NORM in shapes else None,
        **(sizes.pixels("pos_embed.proj.", dim) if embedded else {}),
    }


def _sd3_shapes(config: Mapping[str, Any]) -> Shapes:
    dim, head = _dim(config)
    found = _pixel_shapes(config, "pos_embed.proj.", dim)
    found["pos_embed.pos_embed"] = (1, config["pos_embed_max_size"] ** 2, dim)
    found |= _linear("context_embedder", dim, config["joint_attention_dim"])
    found |= _time_text(dim, {"timestep_embedder": _SINUSOID, "text_embedder": config["pooled_projection_dim"]})
    head = head if config["qk_norm"] else 0
    for i in range(config["num_layers"]):
        last, dual = i == config["num_layers"] - 1, i in config["dual_attention_layers"]
        block = _linear("norm1.linear", (9 if dual else 6) * dim, dim) | _mlp("ff", dim)
        block |= _linear("norm1_context.linear", (2 if last else 6) * dim, dim)
        block |= _joint_attention(dim, head, text_out=not last) | ({} if last else _mlp("ff_context", dim))
        if dual:
            block |= _linears(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"), dim, dim)
            block |= _norms(("attn2.norm_q", "attn2.norm_k"), head) if head else {}
        found |= {f"transformer_blocks.{i}.{key}": shape for key, shape in block.items()}
    return found


# --- The table -------------------------------------------------------------------------------------------------------
_END = ("norm_out.", "proj_out.")
_GUIDANCE = {"embedded_guidance": (float, 0.0, 1000.0)}
_AXES = {"axes_dims_rope": (int, 2, 4096)}
_QWEN3 = (("text_encoder", "tokenizer", "qwen3"),)

LAYOUTS: dict[str, Layout] = {
    layout.source.name: layout
    for layout in (
        Layout(
            SOURCES["zimage"], ("cap_embedder.", "layers.", "noise_refiner.", "context_refiner.", "all_x_embedder."),
            ("layers",), "all_x_embedder.", ("all_final_layer.",), zimage.NOT_IN_SHAPES, zimage.LISTS,
            _QWEN3, zimage.infer_config, zimage.model_shapes, other_names=True,
        ),
        Layout(
            SOURCES["flux2"], ("double_stream_modulation_img.", "time_guidance_embed."), _FLUX_STACKS, "x_embedder.",
            _END, _SHARED | _GUIDANCE | _AXES | {"rope_theta": (float, 1.0, 1e9), "eps": (float, 0.0, 0.1)},
            {"axes_dims_rope": 4}, _QWEN3, _infer_flux2, _flux2_shapes,
        ),
        Layout(
            SOURCES["qwen_image"], ("img_in.", "txt_in."), ("transformer_blocks",), "img_in.", _END, _SHARED | _AXES,
            {"axes_dims_rope": 3}, (("text_encoder", "tokenizer", "qwen2_5_vl"),), _infer_qwen_image,
            _qwen_image_shapes,
        ),
        Layout(
            SOURCES["sd3"], ("pos_embed.",), ("transformer_blocks",), "pos_embed.proj.", _END, _SHARED, {},
            (("text_encoder", "tokenizer", "clip_projected"), ("text_encoder_2", "tokenizer_2", "clip_projected"),
             ("text_encoder_3", "tokenizer_3", "t5")),
            _infer_sd3, _sd3_shapes,
        ),
        Layout(
            SOURCES["flux"], ("single_transformer_blocks.", "x_embedder.", "time_text_embed."), _FLUX_STACKS,
            "x_embedder.", _END, _SHARED | _GUIDANCE | _AXES, {"axes_dims_rope": 3},
            (("text_encoder", "tokenizer", "clip"), ("text_encoder_2", "tokenizer_2", "t5")),
            _infer_flux, _flux_shapes,
        ),
    )
}  # fmt: skip
NOT_IN_SHAPES = frozenset(name for layout in LAYOUTS.values() for name in layout.not_in_shapes)
