"""Images that a client sends: decoded within bounds, by few formats, from memory and no path."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

from PIL import Image, ImageChops, UnidentifiedImageError

from ..errors import FieldError
from ..sampling.drawing import as_mask, check_mask, upright

FORMATS = ("PNG", "JPEG", "WEBP")  # others of PIL's start programs, or are decoded by code that few look at
_DAMAGED = (UnidentifiedImageError, OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)


def open_upload(field: str, file: BinaryIO, pixels: int) -> tuple[Image.Image, str]:
    """An image, decoded, and the SHA-256 of its file in hex.

    Raises:
        FieldError: no PNG, JPEG or WebP, a damaged one, or one of more than ``pixels`` pixels, which isn't decoded.
    """
    digest = hashlib.sha256(file.read()).hexdigest()
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height <= pixels:
            image.load()
            return image, digest
    except _DAMAGED as error:
        raise FieldError(field, f"is not a readable PNG, JPEG or WebP ({type(error).__name__})") from error
    size = f"{image.width}x{image.height}"
    raise FieldError(field, f"has {size} pixels; this server takes {pixels} at most: scale it")


def source_of(image: Image.Image) -> Image.Image:
    """An image to start from: RGB, upright."""
    return upright(image).convert("RGB")


def mask_of(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask for an image of ``size`` (width, height): 255 is repainted.

    As OpenAI has it, what is transparent is repainted. An image that is opaque all over is a mask as everywhere else
    here: white is repainted.

    Raises:
        FieldError: a mask of another size, or one with nothing to repaint.
    """
    image = upright(image)
    alpha = None
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
    holes = alpha is not None and alpha.getextrema()[0] < 255
    mask = ImageChops.invert(alpha) if holes else as_mask(image)
    check_mask(mask.size, size, mask.getextrema()[1])
    return mask
