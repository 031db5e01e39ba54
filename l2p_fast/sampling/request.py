"""What is asked for, as data: `Request`, one image; `Setup`, the model that draws it and how it runs.

Both are frozen, checked once when they are made, and go to JSON and back, so an image file can hold all that repeats
it. No torch here: a mistake is answered before anything heavy is imported. A wrong value raises `FieldError`, which
each surface words with its own name for the field (`--steps`, ``num_inference_steps``).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from ..errors import FieldError, UserError
from ..models import attention as backends
from ..variants import nearest_sizes


class Range(NamedTuple):
    """The values that a number may take, and a usual one."""

    least: float
    most: float
    usual: float
    above: bool = False  # ``least`` itself is left out


LARGEST_SIDE = 1 << 20
STRENGTH, EDIT_STRENGTH = 0.6, 1.0  # of a request that leaves it out: image to image, and a part of an image
RANGES: dict[str, Range] = {
    "steps": Range(1, 10_000, 30),
    "seed": Range(0, 2**63 - 1, 0),
    "height": Range(1, LARGEST_SIDE, 1024),
    "width": Range(1, LARGEST_SIDE, 1024),
    "guidance": Range(0, 1e6, 1),
    "shift": Range(0, 1e6, 3, above=True),
    "strength": Range(0, 1, STRENGTH, above=True),
    "refine": Range(0, 1, 0.35, above=True),
    "mask_blend": Range(0, 4096, 16),
    "coarse_size": Range(0, 1 << 16, 0),
    "coarse_strength": Range(0, 1, 0.6, above=True),
    "head_memory_mb": Range(0, 1e9, 256, above=True),
    "num_images": Range(1, 100_000, 1),
}
_SIZES = ("height", "width", "image_sha256")
# What a field that is given puts out of force in a request that it changes.
REPLACES: dict[str, tuple[str, ...]] = {
    "height": _SIZES,
    "width": _SIZES,
    "image": _SIZES,
    "mask": ("mask_sha256", "refine"),
    "outpaint": (*_SIZES, "refine"),
    "strength": ("refine",),
    "refine": (*_SIZES, "strength", "mask", "mask_sha256", "mask_blend", "outpaint"),
}
OFFLOAD = ("none", "text", "blocks", "model", "sequential", "auto")
LARGEST_LORA, MOST_LORAS = 100, 100  # scale, and how many
LONGEST_PROMPT = 100_000  # characters; the model reads the first 512 tokens
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"} | {
    name: name for name in ("auto", "bfloat16", "float32", "float16")
}
QUANTIZE = {name: name for name in ("none", "fp8", "int8", "nf4")} | {"8bit": "int8", "4bit": "nf4"}


def check_number(field: str, value: float | None, name: str | None = None) -> None:
    """That ``value`` lies in the range of ``field``; None is left to the model.

    Raises:
        FieldError: it doesn't; ``name`` is what the message calls the field.
    """
    if value is None:
        return
    least, most, usual, above = RANGES[field]
    name = name or field
    if field == "seed" and value > most:
        raise FieldError(name, f"must be below 2^63, got {value}; try {value % 2**63}")
    if math.isnan(value) or value < least or (above and value == least):
        wanted = f"above {least:g}" if above else f"at least {least:g}"
        if above and most == 1:
            wanted += " and at most 1"
        none = " (1: none)" if field == "guidance" else ""
        near = 0.1 if above and most == 1 else usual if above or field == "guidance" else least
        raise FieldError(name, f"must be {wanted}{none}, got {value}; try {near:g}")
    if value > most:
        wanted = f"above {least:g} and at most {most:g}" if above else f"at most {most:g}"
        raise FieldError(name, f"must be {wanted}, got {value}; try {most if most == 1 else usual:g}")


def check_size(field: str, value: int, multiple: int | None) -> None:
    """That a height or width suits a model whose sides are multiples of ``multiple`` (None: not known yet)."""
    check_number(field, value)
    if multiple and value % multiple:
        near = nearest_sizes(value, multiple)
        raise FieldError(field, f"must be a multiple of {multiple} for this checkpoint, got {value}; try {near}")


def margins_of(text: str | None) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of ``L,T,R,B``, in pixels; none of None.

    Raises:
        FieldError: other text, or margins that add nothing.
    """
    if text is None:
        return 0, 0, 0, 0
    if not re.fullmatch(r"\s*\d{1,7}\s*(,\s*\d{1,7}\s*){3}", text, re.ASCII):
        raise FieldError("outpaint", f"must be LEFT,TOP,RIGHT,BOTTOM in whole pixels, got {text[:60]!r}; try 0,0,256,0")
    left, top, right, bottom = map(int, text.split(","))
    if not left + top + right + bottom:
        raise FieldError("outpaint", f"adds nothing with {text}; try 0,0,256,0")
    if max(left, top, right, bottom) > LARGEST_SIDE:
        raise FieldError("outpaint", f"adds at most {LARGEST_SIDE} pixels a side, got {text}; try 0,0,256,0")
    return left, top, right, bottom


def interval_of(text: str | None) -> tuple[float, float]:
    """Lowest and highest noise level of ``LOW,HIGH``; all levels of None.

    Raises:
        FieldError: other text, or levels that don't rise within [0, 1].
    """
    if text is None:
        return 0.0, 1.0
    try:
        low, high = map(float, text.split(","))
        if 0 <= low < high <= 1:
            return low, high
    except ValueError:
        pass
    raise FieldError(
        "guidance_interval", f"must be LOW,HIGH, noise levels with 0 <= LOW < HIGH <= 1, got {text[:60]!r}; try 0.2,0.8"
    )


def check_text(field: str, text: str) -> None:
    """That a prompt can be encoded and is not absurdly long."""
    if len(text) > LONGEST_PROMPT:
        raise FieldError(field, f"has {len(text)} characters; at most {LONGEST_PROMPT} are taken: shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"is not valid text at character {error.start + 1}; give it as UTF-8") from None


def choose(field: str, value: str, valid: Collection[str]) -> str:
    """``value`` if it is among ``valid``; else a `FieldError` that names the nearest."""
    if value in valid:
        return value
    near = difflib.get_close_matches(value, list(valid), 1, 0.4)
    hint = f"try {near[0]}" if near else f"choose from {', '.join(valid)}"
    raise FieldError(field, f"has the unknown value {value!r}; {hint}")


_Data = TypeVar("_Data", bound="_Fields")


class _Fields:
    """Reading and writing of a dataclass as plain JSON values."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name: strings, numbers, booleans, None."""
        return dataclasses.asdict(self)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls: type[_Data], values: Mapping[str, Any]) -> _Data:
        """The fields that ``values`` holds; others of its keys are left alone.

        Raises:
            FieldError: a value of the wrong type, or one that can't be.
        """
        kinds, found = get_type_hints(cls), {}
        for name in cls.field_names():
            if name not in values:
                continue
            several = get_origin(kinds[name]) is tuple
            value, kind = values[name], (list, tuple) if several else get_args(kinds[name]) or (kinds[name],)
            if float in kind and isinstance(value, int) and not isinstance(value, bool):
                value = float(value) if abs(value) < 2**53 else math.inf
            if not isinstance(value, kind) or isinstance(value, bool) and bool not in kind:
                raise FieldError(name, f"is {str(value)[:60]!r}, not {kind[0].__name__}")
            found[name] = value
        try:
            return cls(**found)
        except TypeError:  # a required field is missing
            lost = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in found]
            raise FieldError(lost[0], "is missing") from None


@dataclass(frozen=True)
class Request(_Fields):
    """One image to draw. None leaves a choice to the model; what was drawn in the end has none.

    Attributes:
        prompt: what to draw.
        seed: of the noise, which is drawn on the CPU: it means the same on every device.
        negative: prompt that guidance steers away from.
        height, width: in pixels.
        steps: denoising steps.
        guidance: guidance scale; up to 1: none.
        guidance_interval: noise levels (sigma) at which guidance is applied, "LOW,HIGH"; None: at all.
        shift: of the noise schedule.
        image: path of an image to start from; ``image_sha256`` its digest, when it must not have changed since.
        strength: share of the steps that an image to start from is put through, in (0, 1].
        mask: path of a mask of the image's size: white is repainted, black comes back bit for bit, gray is the share
            of the strength; ``mask_sha256`` its digest, when it must not have changed since.
        outpaint: pixels to add to the image, "LEFT,TOP,RIGHT,BOTTOM".
        mask_blend: pixels within the repainted part over which it rises to full strength.
        refine: strength at which a small image is drawn anew at the model's own size, or that of ``height`` and
            ``width``; the image is ``image``, or is drawn first by the setup's ``draft``.
        coarse_size: tokens of the longer side of the coarse start; 0: none.
        coarse_strength: noise level at which full size takes over from the coarse start, in (0, 1].
        cfg_batch: both halves of guidance as one batch: "on", "off" or "auto".

    Raises:
        FieldError: a value that can't be.
    """

    prompt: str
    seed: int
    negative: str = ""
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: str | None = None
    shift: float | None = None
    image: str | None = None
    image_sha256: str | None = None
    strength: float | None = None
    mask: str | None = None
    mask_sha256: str | None = None
    outpaint: str | None = None
    mask_blend: int | None = None
    refine: float | None = None
    coarse_size: int | None = None
    coarse_strength: float | None = None
    cfg_batch: str = "auto"

    def __post_init__(self):
        check_text("prompt", self.prompt)
        check_text("negative", self.negative)
        for name in self.field_names():
            if name in RANGES:
                check_number(name, getattr(self, name))
        choose("cfg_batch", self.cfg_batch, ("auto", "on", "off"))
        margins_of(self.outpaint)
        interval_of(self.guidance_interval)
        for name in ("strength", "mask", "outpaint"):
            if getattr(self, name) is not None and self.image is None:
                raise FieldError(name, "has no effect without {image}; add one, or leave it out")
        if self.mask_blend is not None and not self.edits:
            raise FieldError("mask_blend", "has no effect without {mask} or {outpaint}; add one, or leave it out")
        for name in ("strength", "mask", "outpaint"):
            if getattr(self, name) is not None and self.refine is not None:
                raise FieldError("refine", f"draws all of an image anew; leave it out, or {{{name}}}")

    @property
    def edits(self) -> bool:
        """Whether a part of ``image`` is to come back as it is."""
        return self.mask is not None or self.outpaint is not None

    @property
    def starts_at(self) -> float | None:
        """Share of the steps that the image to start from is put through; None: there is none."""
        if self.image is None and self.refine is None:
            return None
        return self.refine or self.strength or (EDIT_STRENGTH if self.edits else STRENGTH)


def drawn_size(request: Request, image: tuple[int, int] | None, native: int, multiple: int | None) -> tuple[int, int]:
    """(height, width) in pixels of what ``request`` draws.

    Args:
        image: (height, width) of the image that it starts from, upright; None: there is none.
        native: the model's own size.
        multiple: what sides must be multiples of, but those of an image that is kept in part; None: not known yet.

    Raises:
        FieldError: a size that the model can't draw, or another than that of an image that is kept in part.
    """
    sides = request.height, request.width
    if request.edits:
        return kept_size(sides, image, margins_of(request.outpaint))
    if sides == (None, None) and image is not None:
        scale, unit = native / max(image) if request.refine is not None else 1, multiple or 64
        sides = tuple(max(unit, round(side * scale / unit) * unit) for side in image)
    height, width = (side or other or native for side, other in zip(sides, sides[::-1], strict=True))
    for name, side in (("height", height), ("width", width)):
        check_size(name, side, multiple)
    return height, width


def kept_size(
    sides: tuple[int | None, int | None], image: tuple[int, int], margins: tuple[int, int, int, int]
) -> tuple[int, int]:
    """(height, width) of an image of which a part is kept, with its left, top, right and bottom margins.

    Args:
        sides: as asked for; None: not.
        image: (height, width).

    Raises:
        FieldError: another size was asked for.
    """
    left, top, right, bottom = margins
    own = image[0] + top + bottom, image[1] + left + right
    for name, side, needed in zip(("height", "width"), sides, own, strict=True):
        if side not in (None, needed):
            raise FieldError(
                name, f"is {side}, but an image that is kept in part stays as large as it is, {needed}; leave it out"
            )
        check_number(name, needed)
    return own


@dataclass(frozen=True)
class Lora(_Fields):
    """A LoRA, LoHa, LoKr or DoRA over the model.

    Attributes:
        file: its .safetensors file, or a folder with one.
        scale: its strength; 1 is the file's own, 0 none.
        sha256: of the file, in hexadecimal digits, when it must not have changed since.

    Raises:
        FieldError: a value that can't be.
    """

    file: str
    scale: float = 1.0
    sha256: str | None = None

    def __post_init__(self):
        if not self.file or "\0" in self.file or len(self.file) > 4096:
            raise FieldError("lora", f"is not a path: {self.file[:60]!r}")
        if not abs(self.scale) <= LARGEST_LORA:
            raise FieldError("lora", f"has a scale from -{LARGEST_LORA} to {LARGEST_LORA}, got {self.scale}; try 1")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise FieldError("lora", f"has a damaged sha256: {self.sha256[:80]!r}")

    @classmethod
    def of(cls, value: Any) -> Lora:
        """One from plain values, or from ``FILE`` or ``FILE:SCALE``.

        Raises:
            FieldError: a value that can't be.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            file, _, scale = value.rpartition(":")
            try:
                return cls(file, float(scale)) if file else cls(value)
            except ValueError as error:  # a colon of the path
                if isinstance(error, FieldError):
                    raise
                return cls(value)
        if not isinstance(value, Mapping):
            raise FieldError("lora", f"is {str(value)[:60]!r}, not FILE or FILE:SCALE")
        try:
            return cls.from_dict(value)
        except FieldError as error:
            raise FieldError(
                "lora", f"{error.field} {error.problem}" if error.field != "lora" else error.problem
            ) from None

    def __str__(self) -> str:
        return self.file if self.scale == 1 and ":" not in self.file else f"{self.file}:{self.scale}"


@dataclass(frozen=True)
class Setup(_Fields):
    """Which model draws, and how it runs.

    Attributes:
        model: checkpoint file, folder or pipeline folder; tiny-1k or tiny-4k for a bundled model; None: a bundled one.
        text_encoder: folder or hub id with text_encoder/ and tokenizer/; None: the pipeline folder's own.
        lora: LoRAs over the model, as `Lora` or as text, ``FILE`` or ``FILE:SCALE``.
        dtype: bfloat16, float32, float16 (or bf16, fp32, fp16), or auto: the checkpoint's own, where that is fast.
        device: cpu, cuda, cuda:N, mps, xpu, or auto: a GPU if there is one.
        attention: a backend of `models.attention.BACKENDS`, or auto: the fastest of those installed.
        quantize: none, which leaves what a file has quantized as it is stored; fp8 or int8 (or 8bit): the
            blocks' weights and products and the text encoder's weights in 8 bits; nf4 (or 4bit): weights in 4 bits.
        compile: torch.compile the blocks.
        cuda_graph: run the steps by CUDA graphs, where that can be.
        offload: keep in host memory what is not at work: none; text: the text encoder; blocks: that, and the blocks,
            each of which comes while the one before it computes; model: whole models; sequential: single layers; auto:
            the first of none, text and blocks that free memory allows.
        head_memory_mb: working memory of the Detailer Head.
        draft: the model that draws the small image of a request to refine that has none; named as ``model``.

    Raises:
        FieldError: a value that can't be, or a package that isn't installed.
    """

    model: str | None = None
    text_encoder: str | None = None
    lora: tuple[Lora, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    quantize: str = "none"
    compile: bool = False
    cuda_graph: bool = False
    offload: str = "none"
    head_memory_mb: float | None = None
    draft: str | None = None

    def __post_init__(self):
        for name, text in (("model", self.model), ("draft", self.draft), ("text_encoder", self.text_encoder)):
            if text is not None and ("\0" in text or len(text) > 4096):
                raise FieldError(name, f"is not a path: {text[:60]!r}")
        given = [self.lora] if isinstance(self.lora, str) else list(self.lora)
        given = [] if given == ["none"] else given
        if len(given) > MOST_LORAS:
            raise FieldError("lora", f"is given {len(given)} times; at most {MOST_LORAS} are taken")
        object.__setattr__(self, "lora", tuple(map(Lora.of, given)))
        object.__setattr__(self, "dtype", DTYPES[choose("dtype", self.dtype, DTYPES)])
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,4})?", self.device):
            raise FieldError("device", f"must be auto, cpu, cuda, cuda:N, mps or xpu, got {self.device!r}; try auto")
        object.__setattr__(self, "quantize", QUANTIZE[choose("quantize", self.quantize, QUANTIZE)])
        choose("attention", self.attention, backends.BACKENDS)
        try:
            backends.check(self.attention, biased=False)
        except UserError as error:
            raise FieldError("attention", str(error).removeprefix("--").removeprefix("attention ")) from error
        choose("offload", self.offload, OFFLOAD)
        if self.offload not in ("none", "auto") and self.device == "cpu":
            raise FieldError("offload", f"{self.offload} needs a GPU; leave it out with {{device}} cpu")
        check_number("head_memory_mb", self.head_memory_mb)
