"""A drawn image with all that repeats it, and the image files that hold both.

The settings are one JSON object, the fields of `Request` and `Setup` together with versions. PNG keeps it as text,
JPEG and WebP in EXIF's description; what a JPEG segment can't hold goes on in segments of its own. A file that a
stranger wrote is data: its settings are checked by type and size, and `read_image` decodes no more pixels than an
image has any use for.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import FieldError, UserError
from ..files import atomic_path, near_path
from ..formats.header import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SETTINGS_KEY = "l2p_fast"  # of the image's text that holds all settings
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
LARGEST_SIDE = {"webp": 16383, "jpg": 65535}
LARGEST_IMAGE = 2**30  # pixels of an image that is read
LARGEST_PROFILE = 2**20 - 1  # bytes of an ICC profile; PIL opens no PNG with a larger one
_DESCRIPTION, _SOFTWARE = 0x010E, 0x0131  # EXIF tags
_SEGMENT = 60_000  # bytes of settings in a JPEG segment, which holds 65,533 in all
_MARKER, _SIGNATURE = "APP9", b"l2p_fast\0"


@dataclass(frozen=True)
class Drawing:
    """What `Session.draw` returns.

    Attributes:
        image: RGB, 8 bits.
        settings: the request and the setup with every choice made, and versions: what repeats the image.
        seconds: by stage ("coarse", "full"), when each of its steps ended, counted from the start.
    """

    image: Image
    settings: dict[str, Any]
    seconds: dict[str, list[float]]

    def save(self, path: str | Path, format: str | None = None) -> None:
        """Write the file whole or not at all; ``format`` png, jpg or webp, by default that of the suffix, else png.

        Raises:
            UserError: the file can't be written.
        """
        save_image(self.image, Path(path), format or SUFFIXES.get(Path(path).suffix.lower(), "png"), self.settings)

    def thumbnail(self, side: int = 256) -> Image:
        """A copy that fits into ``side`` x ``side`` pixels."""
        small = self.image.copy()
        small.thumbnail((side, side))
        return small

    def pace(self) -> str:
        """``0.41 s a step``, by stage when there are two. The first step of each, which prepares, counts only alone."""
        parts, before = [], 0.0
        for stage, ends in self.seconds.items():
            each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0] - before
            parts.append((f"{stage} " if len(self.seconds) > 1 else "") + f"{each:.3g} s a step x {len(ends)}")
            before = ends[-1]
        return ", ".join(parts)


def save_image(image: Image, path: Path, format: str, settings: dict[str, Any]) -> None:
    """Write ``image`` with ``settings`` in it. Where they can't be kept, the image is, and a warning says so."""
    try:
        options = _options(image, format, settings)
    except (ValueError, TypeError, OverflowError) as error:  # PIL's own limits
        logger.warning("%s is written without its settings: %s", path, error)
        options = _options(image, format, None)
    with atomic_path(path) as temporary:
        image.save(temporary, **options)


def _options(image: Image, format: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    """PIL's arguments for a format, with the settings where it keeps text."""
    text = "" if settings is None else json.dumps(settings)
    profile = color_profile(image)
    kept = {} if profile is None else {"icc_profile": profile}
    if format == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key in ("prompt", "negative", "seed"):
            if settings is not None and key in settings:
                info.add_itxt(key, str(settings[key]))
        info.add_text("Software", f"l2p_fast {__version__}")
        if text:
            info.add_text(SETTINGS_KEY, text)
        return {"format": "PNG", "pnginfo": info, "compress_level": 3} | kept  # 6, the default, takes twice as long
    exif, options = image.getexif(), {"format": "JPEG" if format == "jpg" else "WEBP", "quality": 95} | kept
    if format == "webp" and settings is not None and (settings.get("mask") or settings.get("outpaint")):
        options |= {"lossless": True, "quality": 50}  # what was not repainted stays as it is; quality: of the search
    exif[_SOFTWARE] = f"l2p_fast {__version__}"
    if format == "jpg" and len(text) > _SEGMENT:
        parts = [text[start : start + _SEGMENT].encode() for start in range(0, len(text), _SEGMENT)]
        sized = [(len(_SIGNATURE) + len(part) + 2).to_bytes(2, "big") + _SIGNATURE + part for part in parts]
        options["extra"] = b"".join(b"\xff\xe9" + part for part in sized)
    elif text:
        exif[_DESCRIPTION] = text
    return options | {"exif": exif}


def open_image(field: str, path: str) -> Image:
    """Read an image's header; decode nothing yet.

    Raises:
        UserError: it is missing, none, or has more than `LARGEST_IMAGE` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # PIL's limit is below a 10K image; ours follows
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{field}: {path} is not a file; name an image")
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{field}: {path} does not exist{near_path(path)}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, MemoryError) as error:
        raise UserError(f"{field}: {path} is not a readable image ({type(error).__name__})") from error
    if image.width * image.height > LARGEST_IMAGE:
        raise UserError(f"{field}: {path} has {image.width} x {image.height} pixels, at most 2^30 are read; scale it")
    return image


def read_image(field: str, path: str) -> Image:
    """An image file as RGB, upright.

    Raises:
        UserError: as `open_image`; a damaged file.
    """
    image = open_image(field, path)
    return _decoded(field, path, lambda: upright(image).convert("RGB"))


def _decoded(field: str, path: str, decode: Callable[[], Image]) -> Image:
    try:
        return decode()
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise UserError(f"{field}: {path} is not a readable image ({' '.join(str(error).split())})") from error


def upright(image: Image) -> Image:
    """``image`` turned as its EXIF says, in 8 bits where it was gray of 16."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    return image.point(lambda value: value * (1 / 257) + 0.5).convert("L") if image.mode.startswith("I") else image


def as_mask(image: Image) -> Image:
    """A mask as 8 bits of gray, upright; where it is transparent it is black."""
    from PIL import ImageChops

    image = upright(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return ImageChops.multiply(image.convert("L"), image.getchannel("A"))
    return image.convert("L")


def read_mask(field: str, path: str, size: tuple[int, int]) -> Image:
    """The mask of an image of ``size`` (width, height), as `as_mask` makes it.

    Raises:
        UserError: as `open_image`; a damaged file.
        FieldError: a mask of another size, or one with nothing to repaint.
    """
    mask = open_image(field, path)
    if mask.size in (size, size[::-1]):  # else it is not even decoded
        mask = _decoded(field, path, lambda: as_mask(mask))
    check_mask(mask.size, size, 1 if mask.size != size else mask.getextrema()[1])
    return mask


def check_mask(size: tuple[int, int], wanted: tuple[int, int], most: int, field: str = "mask") -> None:
    """That a mask of ``size`` (width, height) is as large as its image, and that something is to be repainted.

    Args:
        most: the mask's largest value.

    Raises:
        FieldError: it isn't, or nothing is.
    """
    if size != wanted:
        given, own = (f"{width}x{height}" for width, height in (size, wanted))
        raise FieldError(field, f"has {given} pixels and {{image}} {own}; give one of {own}")
    if not most:
        raise FieldError(field, "is black all over, so nothing is to be repainted; paint white what is to change")


def color_profile(image: Image) -> bytes | None:
    """The ICC profile that belongs to the RGB values of ``image``; None: it has none, or none that files can hold."""
    profile = image.info.get("icc_profile")
    fits = isinstance(profile, bytes) and len(profile) <= LARGEST_PROFILE and profile[16:20] == b"RGB "
    return profile if fits else None


def read_settings(field: str, path: str) -> dict[str, Any]:
    """The settings that `Drawing.save` left in an image file, unchecked but for being a JSON object.

    Raises:
        UserError: no such file, no image, or none of ours.
    """
    image = open_image(field, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of damaged EXIF
            text = image.info.get(SETTINGS_KEY) or image.getexif().get(_DESCRIPTION) or _segments(image)
        settings = parse_json(text)
        if isinstance(settings, dict):
            return settings
    except (TypeError, ValueError, AttributeError, OSError, SyntaxError, KeyError):
        pass
    raise UserError(f"{field}: {path} holds no settings of l2p_fast; give an image that it wrote")


def _segments(image: Image) -> str:
    parts = [data for marker, data in getattr(image, "applist", []) if marker == _MARKER]
    return b"".join(part.removeprefix(_SIGNATURE) for part in parts if part.startswith(_SIGNATURE)).decode()
