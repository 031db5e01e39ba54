"""A server on the loopback that speaks OpenAI's chat API as far as it is used, and fails as such servers do.

``Server(answer)`` calls ``answer(body, number)`` for the ``number``-th request, counted from 1. What it returns is the
text of the answer, or a `Fault`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Fault(NamedTuple):
    """A response that is no answer."""

    status: int = 500
    body: bytes = b'{"error": {"message": "broken"}}'
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0  # before it comes
    cut: bool = False  # the connection closes in the middle of the body


TOO_MANY = Fault(429, b'{"error": {"message": "slow down"}}', (("retry-after-ms", "10"),))
NO_ANSWER = Fault(seconds=1.0)
LOST = Fault(200, b'{"id": "x", "choices": [{"mess', cut=True)
NO_FORM = Fault(400, b'{"error": {"message": "response_format of type json_schema is not supported"}}')
NO_KEY = Fault(401, b'{"error": {"message": "wrong key"}}')
NO_MODEL = Fault(404, b'{"error": {"message": "no such model"}}')
PLAIN = Fault(200, b"<html>busy</html>", (("content-type", "text/html"),))


class Server:
    """Use as a context; ``url`` is what the client is given, ``bodies`` the requests that came."""

    def __init__(self, answer: Callable[[dict, int], str | Fault]):
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    server.bodies.append(body)
                    server.keys.append(self.headers["authorization"])
                    number = len(server.bodies)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    self.reply(answer(body, number) if self.path == "/v1/chat/completions" else NO_MODEL)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client no longer waits
                finally:
                    with lock:
                        server.at_once -= 1

            def reply(self, said: str | Fault) -> None:
                if isinstance(said, str):
                    said = Fault(200, json.dumps(completion(said)).encode())
                time.sleep(said.seconds)
                self.send_response(said.status)
                headers = {"content-type": "application/json", **dict(said.headers)}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(said.body) + 100 * said.cut))
                self.end_headers()
                self.wfile.write(said.body)
                self.close_connection = said.cut

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that left
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str) -> dict:
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "tester",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }  # fmt: skip


def subjects(body: dict) -> list[str]:
    """What a request for prompts asks for, in order."""
    return re.findall(r"^\d+\. subject: (.*?) \(", body["messages"][1]["content"], re.M)


def written(body: dict, left_out: int = 0) -> str:
    """A good answer to a request for prompts, but for the last ``left_out``."""
    names = subjects(body)
    some = [
        {"number": number, "prompt": f"A photograph of {name} in the morning light.", "quoted": []}
        for number, name in enumerate(names, 1)
    ]
    return json.dumps({"prompts": some[: len(some) - left_out]})
