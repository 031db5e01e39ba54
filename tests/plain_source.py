"""A stand-in for what draws the images of a set, importable by other processes: plain colors, and a death."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from PIL import Image

from l2p_fast.errors import UserError
from l2p_fast.sampling.drawing import Drawing
from l2p_fast.sampling.request import Request, Setup


@dataclass(frozen=True)
class PlainSource:
    """As `datamaking.painters.Source`. A line of ``drawn.txt`` tells of each image that is begun.

    Who is first to draw a prompt with the word *deadly* in it is killed; *unlucky* ones can't be drawn.
    """

    name: str
    request: Request
    setup: Setup

    @classmethod
    def of(cls, setup: Setup, request: Request, pipeline: str | None) -> PlainSource:
        return cls("plain", replace(request, height=64, width=64), setup)

    def painter(self, device: str):
        def draw(request: Request) -> Drawing:
            with open("drawn.txt", "a") as file:
                file.write(f"{request.seed}\n")
            if "deadly" in request.prompt and not os.path.exists("died"):
                open("died", "w").close()
                os.kill(os.getpid(), 9)
            if "unlucky" in request.prompt:
                raise UserError("the image is not finite")
            settings = {**request.as_dict(), "model": "plain", "steps": 1}
            return Drawing(Image.new("RGB", (64, 64), (request.seed % 256,) * 3), settings, {})

        return draw, ["model      a stand-in"]
