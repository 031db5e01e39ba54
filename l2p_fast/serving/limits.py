"""What one process serves at most. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FieldError
from ..sampling.request import Request


@dataclass(frozen=True)
class Limits:
    """Bounds of a request, of what waits and of what is kept.

    Attributes:
        pixels: of an image, drawn or uploaded, and of a batch of several.
        steps: of an image.
        n: images of a request.
        upload: bytes of a request with files.
        text: bytes of any other request.
        images: files that are kept for their URLs, of ``bytes`` in all.
        seconds: that a client may be silent while it sends or receives.
    """

    pixels: int
    steps: int = 100
    n: int = 10
    upload: int = 64 << 20
    text: int = 2 << 20
    images: int = 200
    bytes: int = 2 << 30
    seconds: float = 60

    def check(self, request: Request) -> None:
        """That a filled request stays within the bounds.

        Raises:
            FieldError: it doesn't.
        """
        if request.height * request.width > self.pixels:
            size = f"{request.width}x{request.height}"
            raise FieldError("size", f"{size} is too large; this server draws {self.pixels} pixels at most")
        if request.steps > self.steps:
            raise FieldError("steps", f"must be at most {self.steps} on this server, got {request.steps}")
