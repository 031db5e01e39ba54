"""What stands before the API: who may ask, how much may be sent, and how long a slow client is waited for."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits
from .problems import problem

_OPEN = ("/health", "/docs", "/openapi.json")  # say nothing that is secret
IMAGES = "/images/"  # whose names can't be guessed
_PIECE = 1 << 16  # bytes that are sent at once; a client that reads none of them is given no more


class _Slow(Exception):
    """A client takes nothing of its answer."""


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine as it is seen from itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before.
        limits: how much may be sent, and how slowly.
        key: that clients must give; None: only pages and programs of this machine may ask. (A page from elsewhere, in a
            browser of this machine, names itself in ``Origin``, or another ``Host``.)
        on_answer: told the route and the status of each answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits, key: str | None, on_answer: Callable[[str, int], None]):
        self.app, self.limits, self.key, self.on_answer = app, limits, key, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path, status = Headers(scope=scope), scope["path"], 0
        edits = path.endswith("/edits")
        most, left = self.limits.upload if edits else self.limits.text, self.limits.seconds
        clock = asyncio.get_running_loop().time
        deadline, taken, whole = clock() + left, 0, False

        async def receive_within() -> Message:
            nonlocal taken, whole
            if whole:  # what comes now is that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, deadline - clock()))
            except asyncio.TimeoutError:
                raise HTTPException(
                    408, f"the request took over {left:g} s to arrive", {"Connection": "close"}
                ) from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > most:
                raise HTTPException(413, f"the request is too large; at most {most} bytes are taken")
            return message

        async def send_within(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            body, more = message.get("body", b""), message.get("more_body", False)
            pieces = [message]
            if len(body) > _PIECE:
                starts = range(0, len(body), _PIECE)
                pieces = [
                    message | {"body": body[at : at + _PIECE], "more_body": more or at != starts[-1]} for at in starts
                ]
            for piece in pieces:
                try:
                    await asyncio.wait_for(send(piece), left)
                except asyncio.TimeoutError:
                    raise _Slow from None

        try:
            refused = self._refusal(path, headers)
            length = headers.get("content-length", "0")
            if refused is None and length.isdigit() and int(length[:19]) > most:
                refused = problem(413, f"the request is too large; at most {most} bytes are taken", code="too_large")
            await (refused or self.app)(scope, receive_within, send_within)
        except _Slow:
            pass
        finally:
            self.on_answer(getattr(scope.get("route"), "path", "none"), status)

    def _refusal(self, path: str, headers: Headers):
        if self.key is None:
            origin = headers.get("origin")
            hosts = [f"//{headers.get('host', '')}", *([origin] if origin is not None else [])]
            if not all(is_loopback(_host(url)) for url in hosts):
                return problem(403, "only pages and programs of this machine may ask; --host and an API key open it")
            return None
        if path in _OPEN or path.startswith(IMAGES):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode()):
            return None
        challenge = {"WWW-Authenticate": "Bearer"}
        return problem(
            401, "wrong or missing API key; send Authorization: Bearer KEY", None, "invalid_api_key", challenge
        )


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
