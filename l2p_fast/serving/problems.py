"""What goes wrong, as answers in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import FieldError, UserError
from .forms import NAMES
from .line import Closed, Full

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def problem(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] = {}
) -> JSONResponse:
    """An answer in OpenAI's form."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": _printable(message), "type": kind, "param": param and _printable(param), "code": code}
    return JSONResponse({"error": error}, status, dict(headers))


def _printable(text: str) -> str:
    """``text`` without what UTF-8 can't hold."""
    return text.encode("utf-8", "replace").decode()


def of_error(error: Exception) -> JSONResponse:
    """The answer to a request that failed with ``error``."""
    if isinstance(error, FieldError):
        return problem(400, error.worded(_name), _name(error.field), "invalid_value")
    if isinstance(error, UserError):
        return problem(400, str(error))
    if isinstance(error, Full):
        return problem(429, "the queue is full; try again later", None, "queue_full", {"Retry-After": "5"})
    if isinstance(error, Closed):
        return problem(503, "the server is stopping", None, "stopping")
    return problem(500, "the image could not be drawn; the server's log says why")


def invalid(errors: Sequence[Mapping[str, Any]]) -> JSONResponse:
    """The answer to fields that pydantic refuses."""
    first = errors[0]
    places = [str(place) for place in first["loc"] if place not in ("body", "query", "path")]
    name = ".".join(places) if first["type"] != "json_invalid" else None
    return problem(400, f"{name}: {first['msg']}" if name else first["msg"], name or None, first["type"])


def _name(field: str) -> str:
    return NAMES.get(field, field)


def add_handlers(app: FastAPI) -> None:
    """Let ``app`` answer every error in this form."""

    @app.exception_handler(RequestValidationError)
    async def _(http: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors())

    @app.exception_handler(HTTPException)
    async def _(http: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return problem(error.status_code, str(error.detail), None, code, error.headers or {})

    async def known(http: Request, error: Exception) -> JSONResponse:
        return of_error(error)

    for kind in (UserError, Full, Closed):
        app.add_exception_handler(kind, known)

    @app.exception_handler(Exception)
    async def _(http: Request, error: Exception) -> JSONResponse:
        return of_error(error)
