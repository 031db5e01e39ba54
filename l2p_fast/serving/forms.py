"""What a client may send: OpenAI's fields of images, and ours beside them."""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..sampling.request import Request

# Ours -> OpenAI's (or diffusers'), where they differ.
NAMES = {"negative": "negative_prompt", "height": "size", "width": "size", "num_images": "n"}
FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # OpenAI's name -> ours

_IGNORED = "taken and ignored"


class Generation(BaseModel):
    """An image, or n, of a prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(description="what to draw")]
    model: Annotated[str | None, Field(description="the model's name; there is one")] = None
    n: Annotated[int, Field(ge=1, description="images, with seeds counting up")] = 1
    size: Annotated[
        str | None,
        Field(pattern=r"^(auto|[1-9]\d{0,5}x[1-9]\d{0,5})$", description="WIDTHxHEIGHT in pixels, or auto"),
    ] = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: Annotated[bool, Field(description="progress and images as server-sent events")] = False
    seed: Annotated[int | None, Field(description="of the first image; left out: a random one, which is told")] = None
    negative_prompt: Annotated[str, Field(description="prompt to steer away from")] = ""
    steps: Annotated[int | None, Field(description="denoising steps")] = None
    guidance: Annotated[float | None, Field(description="guidance scale; 1: none")] = None
    shift: Annotated[float | None, Field(description="of the noise schedule")] = None
    quality: Annotated[str | None, Field(description=_IGNORED)] = None
    style: Annotated[str | None, Field(description=_IGNORED)] = None
    user: Annotated[str | None, Field(description=_IGNORED)] = None
    moderation: Annotated[str | None, Field(description=_IGNORED)] = None
    output_compression: Annotated[int | None, Field(description=_IGNORED)] = None
    background: Literal["auto", "opaque"] | None = None
    partial_images: Annotated[Literal[0] | None, Field(description="none are sent")] = None

    def request(self, **more: Any) -> Request:
        """The first image that is asked for; ``more`` are other fields of it.

        Raises:
            FieldError: a value that can't be.
        """
        width, height = (None, None) if self.size in (None, "auto") else map(int, self.size.split("x"))
        seed = random.SystemRandom().randrange(2**32) if self.seed is None else self.seed
        own = {"steps": self.steps, "guidance": self.guidance, "shift": self.shift}
        return Request(self.prompt, seed, self.negative_prompt, height, width, **own, **more)


class Edit(Generation):
    """An image, or n, from one that is sent: of a part of it with ``mask`` or ``outpaint``, else of all of it."""

    strength: Annotated[float | None, Field(description="how much of the image to replace, above 0 and at most 1")] = (
        None
    )
    mask_blend: Annotated[int | None, Field(description="pixels over which the seam blends")] = None
    outpaint: Annotated[str | None, Field(description="pixels to add: LEFT,TOP,RIGHT,BOTTOM")] = None
    input_fidelity: Annotated[str | None, Field(description=_IGNORED)] = None

    def request(self, **more: Any) -> Request:
        """As of a `Generation`."""
        own = {"strength": self.strength, "mask_blend": self.mask_blend, "outpaint": self.outpaint}
        return super().request(**own, **more)


class Picture(BaseModel):
    """A drawn image, in one of two forms."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Pictures(BaseModel):
    """The answer."""

    created: int
    data: list[Picture]
    size: str
    output_format: str


class Problem(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Wrong(BaseModel):
    """The answer when something was wrong."""

    error: Problem
