"""Noise, and images of every form to pixels (B, 3, H, W) fp32 in [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import UserError
from .drawing import as_mask, check_mask, upright

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def draw_noise(shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Standard normal noise (B, 3, H, W) fp32, drawn image by image.

    One generator draws the images in turn; a list holds one each, so an image does not depend on its neighbors.
    Without one the CPU's global generator draws: a seed means the same image on every device.
    """
    batch = shape[0]
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * batch
    if len(generators) != batch:
        raise UserError(f"generator: wanted one or a list of {batch} (one an image), got {len(generators)}")
    return torch.cat(
        [torch.randn((1, *shape[1:]), generator=g, device=g.device if g is not None else "cpu") for g in generators]
    )


def images_of(image: Any) -> list[Any]:
    """The single images in ``image``: PIL images, arrays (H, W, C) and tensors (C, H, W).

    Raises:
        UserError: anything else.
    """
    if isinstance(image, PIL.Image.Image):
        return [image]
    if isinstance(image, (np.ndarray, Tensor)):
        if image.ndim not in (2, 3, 4):
            raise UserError(f"image: wanted 3 or 4 axes, got {tuple(image.shape)}")
        return list(image) if image.ndim == 4 else [image]
    if isinstance(image, (list, tuple)):
        return [single for one in image for single in images_of(one)]
    raise UserError(f"image: wanted a PIL image, an array or a tensor, got {type(image).__name__}")


def size_of(image: Any) -> tuple[int, int]:
    """(height, width) of a single image, upright."""
    if isinstance(image, PIL.Image.Image):
        width, height = upright(image).size
        return height, width
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.shape[-2:]
    return int(height), int(width)


def image_to_tensor(image: Any, height: int | None = None, width: int | None = None) -> Tensor:
    """A single image as (1, 3, H, W): bytes of a PIL image or of bytes, else fp32 in [-1, 1].

    Args:
        image: PIL image (turned upright by its EXIF, alpha dropped), array (H, W) or (H, W, C), or tensor (C, H, W)
            or (1, C, H, W). Arrays and tensors hold bytes, or floats in [0, 1]; floats below 0 say that the range is
            [-1, 1], as in diffusers.
        height, width: resized to (tensors: antialiased bicubic); None: as large as it is.

    Raises:
        UserError: other values or channels.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = PIL.Image.fromarray(image)
    if isinstance(image, PIL.Image.Image):
        image = upright(image).convert("RGB")
        if height and image.size != (width, height):
            image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    pixels = image
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(image[..., None] if image.ndim == 2 else image).permute(2, 0, 1)
    pixels = pixels if pixels.ndim == 4 else pixels[None] if pixels.ndim == 3 else pixels[None, None]
    if pixels.shape[0] != 1 or pixels.shape[1] not in (1, 3):
        raise UserError(f"image: wanted a tensor (3, H, W) or an array (H, W, 3), got {tuple(image.shape)}")
    pixels = pixels.expand(1, 3, -1, -1)
    if pixels.is_floating_point():
        pixels = pixels.float()
        low, high = (value.item() for value in torch.aminmax(pixels))
        if not (-1.01 <= low and high <= 1.01):
            raise UserError(f"image: wanted bytes, or floats in [0, 1] or [-1, 1], got values from {low:g} to {high:g}")
        pixels = (pixels if low < 0 else pixels * 2 - 1).clamp(-1, 1)
    elif pixels.dtype != torch.uint8:
        raise UserError(f"image: wanted bytes or floats, got {image.dtype}")
    if height and pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(to_float(pixels), (height, width), mode="bicubic", antialias=True).clamp_(-1, 1)
    return pixels


def to_float(pixels: Tensor) -> Tensor:
    """Bytes as fp32 in [-1, 1]; what is fp32 stays as it is."""
    return pixels.float().div_(127.5).sub_(1) if pixels.dtype == torch.uint8 else pixels


def image_to_pixels(image: Any, height: int, width: int) -> Tensor:
    """A single image as (1, 3, H, W) fp32 in [-1, 1], resized to ``height`` x ``width``; see `image_to_tensor`."""
    return to_float(image_to_tensor(image, height, width))


def mask_to_tensor(mask: Any, height: int, width: int) -> Tensor:
    """A single mask as bytes (1, 1, H, W): 255 is repainted, 0 kept, what lies between a strength.

    Args:
        mask: PIL image (see `as_mask`), array (H, W) or (H, W, 1), or tensor (1, H, W) or (1, 1, H, W): bytes,
            booleans, or floats in [0, 1].
        height, width: that it must have.

    Raises:
        UserError: another size, other values, or a mask that is 0 all over.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.ndim == 3 and mask.shape[-1] > 1:
        mask = PIL.Image.fromarray(mask)
    if isinstance(mask, PIL.Image.Image):
        mask = np.array(as_mask(mask))
    values = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if isinstance(mask, np.ndarray) and mask.ndim == 3:
        values = values.permute(2, 0, 1)
    if values.numel() != values.shape[-1] * values.shape[-2]:
        raise UserError(f"mask_image: wanted one channel, got a shape of {tuple(mask.shape)}")
    values = values.reshape(1, 1, *values.shape[-2:])
    if values.dtype == torch.bool:
        values = values.byte() * 255
    elif values.is_floating_point():
        low, high = (value.item() for value in torch.aminmax(values))
        if not 0 <= low <= high <= 1:
            raise UserError(f"mask_image: wanted floats in [0, 1], got values from {low:g} to {high:g}")
        values = (values.float() * 255).round_().byte()
    elif values.dtype != torch.uint8:
        raise UserError(f"mask_image: wanted bytes, booleans or floats, got {values.dtype}")
    check_mask((values.shape[3], values.shape[2]), (width, height), int(values.max()), "mask_image")
    return values


def pixels_to_images(pixels: Tensor, output_type: str) -> Any:
    """Pixels (B, 3, H, W) in [-1, 1] as ``output_type`` asks.

    "pil": a list; "np" (B, H, W, 3) or "pt" (B, 3, H, W): in [0, 1]; "latent": unchanged.
    """
    if output_type == "latent":
        return pixels
    if output_type == "pil":
        return [PIL.Image.fromarray(image) for image in ops.to_uint8(pixels).cpu().numpy()]
    pixels = (pixels / 2 + 0.5).clamp_(0, 1).cpu()
    return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).numpy()
