"""OpenAI's API of images over a `Line`: what a client sends becomes tickets, what they become its answer.

Names of files are random, and what a client wrote is text of a prompt and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as Http
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from .. import __version__
from ..errors import FieldError
from ..sampling.drawing import Drawing
from ..sampling.request import Request
from .counts import Metrics
from .docs_page import docs_page
from .forms import FORMATS, Edit, Generation, Pictures, Wrong
from .guard import IMAGES, Guard
from .limits import Limits
from .line import Closed, Line, Ticket
from .problems import add_handlers, invalid, of_error, problem
from .store import ImageStore
from .uploads import mask_of, open_upload, source_of

_GLANCE = 0.1  # seconds between two looks at how far an image is
_SIGN_OF_LIFE = 10.0  # seconds without news after which a comment is sent
_WRONG = {status: {"model": Wrong} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503)}
_EVENTS = {"text/event-stream": {"schema": {"type": "object"}}}


class Api:
    """The routes.

    Args:
        line: draws; its session's pipeline fills what a request leaves out.
        store: where images are kept for their URLs.
        limits: of a request.
        name: of the model.
        metrics: where its answers are counted; those of ``line`` may go there, too.
        key: that clients must give; None: see `Guard`.
    """

    def __init__(
        self, line: Line, store: ImageStore, limits: Limits, name: str, metrics: Metrics, key: str | None = None
    ):
        self.line, self.store, self.limits, self.name, self.metrics = line, store, limits, name, metrics
        self.key, self.since = key, int(time.time())

    def app(self) -> FastAPI:
        """The application; a web page is mounted on it."""
        app = FastAPI(title="l2p_fast", version=__version__, docs_url=None, redoc_url=None, responses=_WRONG)
        add_handlers(app)
        app.include_router(self._router())
        app.add_middleware(Guard, limits=self.limits, key=self.key, on_answer=self.metrics.on_answer)

        @app.get("/docs", include_in_schema=False)
        def docs() -> HTMLResponse:
            return HTMLResponse(docs_page(app.openapi()))

        return app

    def _router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        answers = {"responses": {200: {"model": Pictures, "content": _EVENTS}}}
        add("/v1/images/generations", self.generate, methods=["POST"], **answers)
        add("/v1/images/edits", self.edit, methods=["POST"], openapi_extra={"requestBody": _edit_body()}, **answers)
        add("/v1/models", self.models, methods=["GET"])
        add("/v1/models/{model:path}", self.model, methods=["GET"])
        add(IMAGES + "{name}", self.image, methods=["GET"], response_class=FileResponse)
        add("/health", self.health, methods=["GET"])
        add("/metrics", self.counted, methods=["GET"], response_class=Response)
        return router

    async def generate(self, form: Generation, http: Http) -> Response:
        """Draw images of a prompt."""
        return await self._answer(http, form, "image_generation", form.request())

    async def edit(self, http: Http) -> Response:
        """Draw images from an image: a part of it, more around it, or all of it anew."""
        async with http.form(max_files=3, max_fields=50) as sent:
            files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
            values: dict[str, Any] = {}
            for name, value in sent.multi_items():
                name = name.removesuffix("[]") if isinstance(value, UploadFile) else name
                if isinstance(value, UploadFile) and name in files:
                    files[name].append(value)
                elif name in values or name in files or isinstance(value, UploadFile):
                    raise FieldError(name[:60], "is sent twice, or is a file where a value is wanted, or the reverse")
                else:
                    values[name] = value
            try:
                form = Edit.model_validate(values)
            except ValidationError as error:
                return invalid(error.errors(include_url=False))
            if len(files["image"]) != 1 or len(files["mask"]) > 1:
                raise FieldError("image", "is wanted once, as a file, and {mask} once at most")
            uploads = [file.file for name in ("image", "mask") for file in files[name]]
            request, image, mask = await asyncio.to_thread(self._read, form, *uploads)
        return await self._answer(http, form, "image_edit", request, image, mask)

    def _read(self, form: Edit, image: Any, mask: Any = None) -> tuple[Request, Any, Any]:
        """The request, the image and the mask of an edit."""
        opened, digest = open_upload("image", image, self.limits.pixels)
        source, more = source_of(opened), {"image": "image", "image_sha256": digest}
        if mask is not None:
            opened, digest = open_upload("mask", mask, self.limits.pixels)
            mask, more = mask_of(opened, source.size), more | {"mask": "mask", "mask_sha256": digest}
        return form.request(**more), source, mask

    async def _answer(
        self, http: Http, form: Generation, kind: str, request: Request, image: Any = None, mask: Any = None
    ) -> Response:
        """Put what is asked for into the line, and answer with what comes of it."""
        if form.model not in (None, self.name):
            return problem(404, f"there is no model {form.model[:60]!r}; {self.name} is", "model", "model_not_found")
        if form.n > self.limits.n:
            raise FieldError("n", f"must be at most {self.limits.n} on this server, got {form.n}")
        request = self.line.session.fill(request, image)
        self.limits.check(request)
        tickets = [Ticket(replace(request, seed=request.seed + i), image, mask) for i in range(form.n)]
        self.line.put(tickets)
        if form.stream:
            return _Events(tickets, self._events(http, form, kind, tickets))
        drawings = await _drawn(http, tickets)
        if drawings is None:
            return Response(status_code=499)  # nobody reads it
        data = [await self._picture(http, form, drawing) for drawing in drawings]
        return JSONResponse({"created": int(time.time()), "data": data} | _facts(form, drawings[0]))

    async def _picture(self, http: Http, form: Generation, drawing: Drawing) -> dict[str, Any]:
        """A drawn image as its client wants it."""
        drawing = replace(drawing, settings=_public(drawing.settings, self.name))
        format, seed = FORMATS[form.output_format], drawing.settings["seed"]
        if form.response_format == "url":
            name = await asyncio.to_thread(self.store.keep, drawing, format)
            return {"url": f"{str(http.base_url).rstrip('/')}{IMAGES}{name}", "seed": seed}
        file = await asyncio.to_thread(self.store.encode, drawing, format)
        return {"b64_json": base64.b64encode(file).decode(), "seed": seed}

    async def _events(self, http: Http, form: Generation, kind: str, tickets: Sequence[Ticket]) -> AsyncIterator[str]:
        """How far the images are, as often as it changes, and each image when it is there."""
        futures = {asyncio.wrap_future(ticket.future): index for index, ticket in enumerate(tickets)}
        told: dict[int, dict[str, Any]] = {}
        news = time.monotonic()
        while futures:
            done, _ = await asyncio.wait(futures, timeout=_GLANCE, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index = futures.pop(future)
                try:
                    drawing = _result(future)
                    picture = await self._picture(http, form, drawing)
                except Exception as error:
                    yield f"event: error\ndata: {of_error(error).body.decode()}\n\n"
                    return
                made = {"created_at": int(time.time()), "background": "opaque", "quality": "auto"}
                yield _event(f"{kind}.completed", picture | made | _facts(form, drawing) | {"index": index})
            for index in futures.values():
                ticket = tickets[index]
                state = {"step": ticket.step, "steps": ticket.total, "ahead": self.line.ahead(ticket)}
                if told.get(index) != state:
                    told[index], news = state, time.monotonic()
                    yield _event(f"{kind}.progress", {"index": index} | state)
            if time.monotonic() - news > _SIGN_OF_LIFE:
                news = time.monotonic()
                yield ": still at work\n\n"

    async def models(self) -> dict[str, Any]:
        """The model that draws."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> Any:
        """What is known of a model."""
        known = model == self.name
        return self._model() if known else problem(404, "there is no such model", "model", "model_not_found")

    def _model(self) -> dict[str, Any]:
        pipe, most = self.line.session.pipeline, self.limits
        sizes = {"size_multiple": pipe.size_multiple, "max_pixels": most.pixels, "max_steps": most.steps}
        usual = {"steps": pipe.default_steps, "guidance": pipe.default_guidance_scale, "shift": pipe.default_shift}
        who = {"id": self.name, "object": "model", "created": self.since, "owned_by": "l2p_fast"}
        return who | sizes | {"max_n": most.n, "defaults": usual}

    async def image(self, name: str) -> Response:
        """An image by its URL, as long as it is kept."""
        path = self.store.find(name)
        if path is None:
            return problem(404, "there is no such image, or it is no longer kept", None, "not_found")
        return FileResponse(path, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private"})

    async def health(self) -> JSONResponse:
        """Whether images are drawn, and how many wait."""
        alive = self.line.alive
        state = {"status": "ok" if alive else "stopped", "waiting": self.line.waiting, "drawing": self.line.drawing}
        return JSONResponse(state, 200 if alive else 503)

    async def counted(self) -> Response:
        """Prometheus' metrics."""
        return Response(self.metrics.text(self.line), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Events(StreamingResponse):
    """Server-sent events about tickets, which are cancelled when nobody listens any more."""

    media_type = "text/event-stream"

    def __init__(self, tickets: Sequence[Ticket], events: AsyncIterator[str]):
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.tickets = tickets

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            _cancel(self.tickets)


def _event(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | values)}\n\n"


def _cancel(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.future.cancel()


def _result(future: asyncio.Future) -> Any:
    if future.cancelled():
        raise Closed
    return future.result()


async def _drawn(http: Http, tickets: Sequence[Ticket]) -> list[Drawing] | None:
    """What the tickets become; None: the client has left, and they are cancelled."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))
    gone = asyncio.ensure_future(left())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return _result(work) if work.done() else None
    finally:
        gone.cancel()
        _cancel(tickets)


def _facts(form: Generation, drawing: Drawing) -> dict[str, Any]:
    return {"size": f"{drawing.image.width}x{drawing.image.height}", "output_format": form.output_format}


def _public(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings that go into an image's file without the paths of this machine."""
    loras = [lora | {"file": Path(lora["file"]).name} for lora in settings["lora"]]
    encoder = settings["text_encoder"]
    return settings | {"model": name, "lora": loras, "text_encoder": encoder and Path(encoder).name}


def _edit_body() -> dict[str, Any]:
    """The form of an edit, which is read by hand, for the documentation."""
    schema = Edit.model_json_schema()
    file = {"type": "string", "format": "binary"}
    image = file | {"description": "PNG, JPEG or WebP"}
    mask = file | {"description": "of the image's size; transparent, or white where all is opaque, is repainted"}
    schema["properties"] |= {"image": image, "mask": mask}
    schema["required"] = ["image", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
