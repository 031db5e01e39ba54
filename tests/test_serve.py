"""The server: OpenAI's own client against a real one on the loopback, and what clients do wrong."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import tiny_pipeline

from l2p_fast import serve
from l2p_fast.errors import UserError
from l2p_fast.sampling.drawing import Drawing
from l2p_fast.sampling.request import Request, Setup
from l2p_fast.sampling.session import Session

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from l2p_fast.serving.api import Api  # noqa: E402
from l2p_fast.serving.counts import Metrics  # noqa: E402
from l2p_fast.serving.limits import Limits  # noqa: E402
from l2p_fast.serving.line import Full, Line, Ticket  # noqa: E402
from l2p_fast.serving.store import ImageStore  # noqa: E402

KEY = "a-key-of-the-tests-0123456789"
LIMITS = Limits(pixels=128 * 128, steps=10_000, n=4, upload=200_000, text=20_000, images=3, seconds=20)


class Watched(Session):
    """Draws once ``open`` is set, and notes the prompts of each batch; "bad" is one that can't be drawn."""

    def __init__(self):
        super().__init__(tiny_pipeline(default_steps=2, default_guidance_scale=2.0), Setup(), "tiny")
        self.open, self.batches = threading.Event(), []
        self.open.set()

    def draw_together(self, requests, *args):
        self.open.wait(20)
        self.batches.append([request.prompt for request in requests])
        if any(request.prompt == "bad" for request in requests):
            raise UserError("that can't be drawn")
        return super().draw_together(requests, *args)


@pytest.fixture(scope="module")
def session():
    return Watched()


@pytest.fixture
def start(session, tmp_path):
    """``start()`` serves; returns the `Api`, whose ``url`` is set."""
    with contextlib.ExitStack() as stack:

        def start(limits=LIMITS, key=None, **options):
            metrics = Metrics()
            line = stack.enter_context(Line(session, on_batch=metrics.on_batch, **options))
            api = Api(line, ImageStore(tmp_path, limits.images, limits.bytes), limits, "tiny", metrics, key)
            server = uvicorn.Server(uvicorn.Config(api.app(), log_level="critical", http="h11", ws="none"))
            sock = serve.listen("127.0.0.1", 0)
            api.port = sock.getsockname()[1]
            api.url = f"http://127.0.0.1:{api.port}"
            thread = threading.Thread(target=server.run, args=([sock],))
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            stack.callback(session.open.set)
            until(lambda: server.started)
            session.batches.clear()
            return api

        yield start


def until(happens, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def client(api, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(api, method: str, path: str, body: bytes | dict | None = None, headers: dict | None = None):
    """Status, headers and body of a plain request."""
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {})
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def generate(api, **fields):
    return ask(api, "POST", "/v1/images/generations", {"prompt": "a star", "size": "32x32"} | fields)


def decoded(data) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def same(image: Image.Image, drawing: Drawing) -> bool:
    """Up to a level: a batch's sums are rounded in another order."""
    return np.abs(np.asarray(image, np.int16) - np.asarray(drawing.image, np.int16)).max() <= 1


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int = 48, height: int = 32, channels: int = 3) -> Image.Image:
    shape = height, width, channels
    return Image.fromarray(torch.randint(0, 256, shape, generator=torch.manual_seed(0)).to(torch.uint8).numpy())


def test_openai_client(start, session):
    api = start()
    ours = {"seed": 7, "steps": 3, "guidance": 3.0, "shift": 2.0, "negative_prompt": "a ring"}
    answer = client(api).images.generate(prompt="a star", n=2, size="48x32", extra_body=ours)
    assert [data.seed for data in answer.data] == [7, 8] and answer.size == "48x32"
    request = Request("a star", 7, "a ring", 32, 48, 3, 3.0, shift=2.0)
    for i, data in enumerate(answer.data):
        assert same(decoded(data), session.draw(replace(request, seed=7 + i)))
    settings = json.loads(decoded(answer.data[1]).info["l2p_fast"])
    assert settings["seed"] == 8 and settings["model"] == "tiny" and settings["prompt"] == "a star"
    [model] = client(api).models.list().data
    assert model.id == client(api).models.retrieve("tiny").id == "tiny" and model.size_multiple == 16
    assert json.loads(ask(api, "GET", "/health")[2]) == {"status": "ok", "waiting": 0, "drawing": 0}
    counted = ask(api, "GET", "/metrics")[2].decode()
    assert "l2p_images_drawn_total 2.0" in counted and 'route="/v1/images/generations",status="200"} 1.0' in counted


def test_urls_and_formats(start, tmp_path):
    api = start()
    names = []
    for format in ("png", "jpeg", "webp", "png"):
        fields = {"response_format": "url", "output_format": format, "size": "32x32"}
        [data] = client(api).images.generate(prompt="../../a", model="tiny", **fields).data
        status, headers, body = ask(api, "GET", data.url.removeprefix(api.url))
        assert status == 200 and headers["Content-Type"] == f"image/{format}"
        assert Image.open(io.BytesIO(body)).format == format.upper()
        names.append(data.url.rpartition("/")[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])  # three are kept
    assert ask(api, "GET", f"/images/{names[0]}")[0] == 404
    for path in ("/images/../test_serve.py", "/images/%2e%2e%2fx", "/images/", "/images/a%00b", "/images//etc/passwd"):
        assert ask(api, "GET", path)[0] == 404


def test_a_batch_equals_each_alone(start, session):
    api = start()
    session.open.clear()
    requests = [Request(f"{'very ' * i}round", i, "thin" * i, 32, 48, 3, 2.0) for i in range(3)]
    more = [Request("other size", 5, "", 32, 32, 3, 2.0), Request("other steps", 6, "", 32, 48, 2, 2.0)]

    def draw(request):
        fields = {"seed": request.seed, "steps": request.steps, "negative_prompt": request.negative}
        size = f"{request.width}x{request.height}"
        return client(api).images.generate(prompt=request.prompt, size=size, extra_body=fields).data[0]

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(draw, replace(requests[0], prompt="first"))
        until(lambda: api.line.drawing == 1)
        others = []
        for i, request in enumerate([*requests, *more]):
            others.append(pool.submit(draw, request))
            until(lambda i=i: api.line.waiting == i + 1)
        session.open.set()
        first.result()
        images = [decoded(future.result()) for future in others]
    drawn = session.batches[:]
    for request, image in zip([*requests, *more], images, strict=True):
        assert same(image, session.draw(request)), request
    assert drawn == [["first"], [request.prompt for request in requests], ["other size"], ["other steps"]]


def test_one_that_fails_does_not_take_others_with_it(session):
    with Line(session) as line:
        request = session.fill(Request("good", 1, height=32, width=32))
        session.open.clear()
        tickets = [Ticket(replace(request, prompt=prompt)) for prompt in ("first", "good", "bad", "good")]
        line.put(tickets)
        session.open.set()
        for ticket in tickets[::3] + tickets[1:2]:
            assert ticket.future.result(20).image.size == (32, 32)
        with pytest.raises(UserError, match="can't be drawn"):
            tickets[2].future.result(20)


def test_progress_as_events(start, session):
    api = start()
    events = list(client(api).images.generate(prompt="a", n=2, size="32x32", stream=True, extra_body={"steps": 40}))
    drawn = [event for event in events if event.type == "image_generation.completed"]
    assert sorted(event.index for event in drawn) == [0, 1] and drawn[-1] is events[-1]
    assert {decoded(event).size for event in drawn} == {(32, 32)}
    steps = [event.step for event in events if event.type == "image_generation.progress" and event.index == 0]
    # A client that is slower than the steps is told of the last one alone.
    assert steps and steps == sorted(set(steps)) and len(steps) + 2 <= len(events)
    with pytest.raises(openai.APIError, match="can't be drawn"):
        list(client(api).images.generate(prompt="bad", size="32x32", stream=True))


def test_edits(start, session):
    api, image = start(), noise(40, 24)
    mask = Image.new("L", image.size)
    mask.paste(255, (8, 8, 24, 24))
    holes = Image.new("RGBA", image.size, (9, 9, 9, 255))
    holes.paste((9, 9, 9, 0), (8, 8, 24, 24))
    ours = {"seed": 3, "steps": 3, "mask_blend": 0}
    edit = client(api).images.edit
    given = {"prompt": "a star", "image": ("in.png", png(image)), "extra_body": ours}
    [white], [clear] = (edit(**given, mask=png(one)).data for one in (mask, holes))  # ours, and OpenAI's
    repainted = np.asarray(mask) > 0
    for data in (white, clear):
        drawn = np.asarray(decoded(data))
        assert (drawn == np.asarray(image))[~repainted].all() and (drawn != np.asarray(image))[repainted].any()
    assert decoded(white).tobytes() == decoded(clear).tobytes()
    settings = json.loads(decoded(white).info["l2p_fast"])
    assert settings["image"] == "image" and len(settings["mask_sha256"]) == 64
    given["extra_body"] = {"outpaint": "0,0,16,8", "seed": 3}
    [wide] = edit(**given).data
    assert decoded(wide).size == (56, 32) and (np.asarray(decoded(wide))[:24, :40] == np.asarray(image)).all()
    given["extra_body"] = {"strength": 0.5, "seed": 3}
    [anew] = edit(**given, size="32x32").data
    assert same(decoded(anew), session.draw(Request("a star", 3, "", 32, 32, image="x", strength=0.5), image=image))
    kinds = [event.type for event in edit(**given, stream=True)]
    assert kinds[-1] == "image_edit.completed"


def test_a_full_queue(start, session):
    api = start(most_waiting=2)
    session.open.clear()
    with ThreadPoolExecutor(2) as pool:
        drawing = pool.submit(generate, api)
        until(lambda: api.line.drawing == 1)
        waiting = pool.submit(generate, api, n=2)
        until(lambda: api.line.waiting == 2)
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            client(api).images.generate(prompt="a", size="32x32")
        session.open.set()
        assert drawing.result()[0] == waiting.result()[0] == 200
    assert generate(api)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_forgotten(start, session, stream):
    api = start(most_together=1)
    connections = []
    for prompt in ("long", "waits"):
        connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
        body = json.dumps({"prompt": prompt, "size": "32x32", "steps": 9999, "stream": stream})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        connections.append(connection)
        until(lambda prompt=prompt: ["long"] in session.batches and api.line.waiting == (prompt == "waits"))
    for connection in connections[::-1]:
        connection.close()
    until(lambda: not api.line.waiting and not api.line.drawing, 5)
    assert generate(api)[0] == 200
    assert session.batches == [["long"], ["a star"]]
    assert "l2p_images_cancelled_total 1.0" in ask(api, "GET", "/metrics")[2].decode()


def test_closing_ends_what_is_drawn(session):
    with Line(session, most_waiting=2) as line:
        tickets = [Ticket(session.fill(Request("a", 0, height=32, width=32, steps=9999))) for _ in range(2)]
        line.put(tickets)
        with pytest.raises(Full):
            line.put([*tickets, *tickets])
        until(lambda: tickets[0].step)
    assert all(ticket.future.cancelled() for ticket in tickets) and not line.alive


def test_a_key(start):
    api = start(key=KEY)
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        client(api, "wrong").images.generate(prompt="a")
    for path in ("/v1/models", "/metrics", "/nothing"):
        assert ask(api, "GET", path)[0] == ask(api, "GET", path, headers={"Authorization": "Bearer é"})[0] == 401
    for path in ("/health", "/docs", "/openapi.json"):
        assert ask(api, "GET", path)[0] == 200
    [data] = client(api, KEY).images.generate(prompt="a", size="32x32", response_format="url").data
    assert ask(api, "GET", data.url.removeprefix(api.url), headers={"Host": "example.org"})[0] == 200


def test_pages_from_elsewhere_are_refused_without_a_key(start):
    api = start()
    for headers in ({"Host": "example.org"}, {"Origin": "http://example.org"}, {"Origin": "null"}, {"Host": "["}):
        assert ask(api, "GET", "/v1/models", headers=headers)[0] == 403
    assert ask(api, "GET", "/v1/models", headers={"Host": "localhost:1", "Origin": "http://[::1]:7860"})[0] == 200


WRONG = [
    ({"size": "100x32"}, "size"),
    ({"size": "big"}, "size"),
    ({"size": "999999x999999"}, "size"),
    ({"size": "4096x16"}, "size"),
    ({"steps": 0}, "steps"),
    ({"steps": 10_001}, "steps"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"guidance": -1}, "guidance"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 2**63 - 1, "n": 2}, "seed"),
    ({"model": "dall-e-3"}, "model"),
    ({"siz": "32x32"}, "siz"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"\ud800": 1}, None),
    ({"negative_prompt": "\udfff"}, "negative_prompt"),
    ({"response_format": "file"}, "response_format"),
    ({"partial_images": 2}, "partial_images"),
]


def test_wrong_values(start):
    api = start()
    for fields, param in WRONG:
        status, _, body = generate(api, **fields)
        assert status == (404 if param == "model" else 400), fields
        error = json.loads(body)["error"]
        assert error["type"] == "invalid_request_error" and error["param"] == param and error["message"], fields
    for body in (b"", b"[]", b"{", b'"x"', b"\xff", b'{"prompt": NaN}', b"[" * 10_000):
        status, _, said = ask(api, "POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        assert status == 400 and json.loads(said)["error"]["type"] == "invalid_request_error", body
    assert json.loads(ask(api, "GET", "/v1/nothing")[2])["error"]["code"] == "not_found"
    assert json.loads(ask(api, "GET", "/v1/images/edits")[2])["error"]["code"] == "method_not_allowed"
    assert json.loads(ask(api, "GET", "/v1/models/gpt")[2])["error"]["param"] == "model"


def test_wrong_uploads(start):
    api, good = start(), png(noise())
    edit = client(api).images.edit
    gif = io.BytesIO()
    noise().save(gif, "GIF")
    small, black = png(Image.new("L", (8, 8), 255)), png(Image.new("L", (48, 32)))
    cases = [
        ({"image": b"no image"}, "image is not a readable PNG"),
        ({"image": gif.getvalue()}, "image is not a readable PNG"),
        ({"image": good[:500]}, "image is not a readable PNG"),
        ({"image": png(Image.new("L", (129, 129)))}, "image has 129x129 pixels"),
        ({"image": [good, good]}, "image is wanted once"),
        ({"image": good, "mask": small}, "mask has 8x8 pixels and image 48x32"),
        ({"image": good, "mask": black}, "mask is black all over"),
        ({"image": good, "extra_body": {"outpaint": "1,2"}}, "outpaint must be LEFT"),
        ({"image": good, "extra_body": {"outpaint": "0,0,999,0"}}, "is too large"),
        ({"image": good, "extra_body": {"mask_blend": 3}}, "has no effect without mask"),
        ({"image": good, "extra_body": {"steps": "many"}}, "steps"),
    ]
    for fields, words in cases:
        with pytest.raises(openai.BadRequestError, match=words):
            edit(prompt="a", **fields)
    with pytest.raises(openai.APIStatusError, match="at most 200000 bytes"):
        edit(prompt="a", image=b"x" * 300_000)
    assert ask(api, "POST", "/v1/images/edits", {"prompt": "a"})[0] == 400


def test_large_and_slow_requests(start):
    api = start(replace(LIMITS, seconds=0.5))
    assert generate(api, prompt="a" * 30_000)[0] == 413
    parts = (b'{"prompt": "' + b"a" * 15_000, b"a" * 15_000, b'"}')  # no length is said
    assert ask(api, "POST", "/v1/images/generations", iter(parts), {"Content-Type": "application/json"})[0] == 413
    with socket.create_connection(("127.0.0.1", api.port)) as slow:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
        slow.settimeout(20)
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    assert ask(api, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "a\0b", "\u202e\u0007<script>", "雾" * 1000, "{image}", "%s{0}"]
)
def test_hostile_prompts(start, tmp_path, prompt):
    api = start()
    status, _, body = generate(api, prompt=prompt, response_format="url", user=prompt)
    assert status == 200 and prompt not in json.loads(body)["data"][0]["url"]
    [file] = tmp_path.iterdir()
    assert len(file.stem) == 32 and int(file.stem, 16) >= 0


def test_store(tmp_path):
    store, drawing = ImageStore(tmp_path, 10, 1500), Drawing(noise(16, 16), {}, {})
    names = [store.keep(drawing, "png") for _ in range(3)]
    size = store.find(names[2]).stat().st_size
    assert 500 < size < 1000 and [store.find(name) is not None for name in names] == [False, size <= 750, True]
    assert store.encode(drawing, "png") == store.find(names[2]).read_bytes()
    assert store.find(f"../{tmp_path.name}/{names[2]}") is None


@pytest.mark.slow
def test_fuzzed(start, session, monkeypatch, tmp_path):
    """Schemathesis finds nothing that is no answer of the API; what is drawn is blank, so that much is asked."""
    pytest.importorskip("schemathesis")

    def blank(requests, *_):
        settings = session.setup.as_dict() | requests[0].as_dict()
        return [Drawing(Image.new("RGB", (one.width, one.height)), settings, {}) for one in requests]

    monkeypatch.setattr(session, "draw_together", blank)
    api = start(replace(LIMITS, pixels=1024 * 1024))
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--max-examples", "15", "--checks", checks, "--seed", "1", "--no-color", "--phases", "coverage,fuzzing"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json", *options]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-2000:]
    assert ask(api, "GET", "/health")[0] == 200


@pytest.mark.slow
def test_the_command_serves_and_stops(tmp_path):
    command = [sys.executable, "-m", "l2p_fast", "serve", "--port", "0", "--max-steps", "1000"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as server, contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        line = next(line for line in server.stdout if line.startswith("serving"))
        api = SimpleNamespace(port=int(re.search(r":(\d+) ", line)[1]))
        assert generate(api, size="128x128", steps=1, response_format="url")[0] == 200
        assert len(list(tmp_path.glob("l2p-serve-*/*.png"))) == 1
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(generate, api, size="256x256", steps=4)
            until(lambda: json.loads(ask(api, "GET", "/health")[2])["drawing"])
            server.terminate()
            assert last.result()[0] == 200  # what is being drawn is finished
        assert server.wait(60) == 0 and not server.stderr.read()
    assert not list(tmp_path.glob("l2p-serve-*"))


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(serve.KEY, raising=False)
    (tmp_path / "short").write_text("hush-hush")
    for argv, words in (
        (["--host", "0.0.0.0"], "an API key is needed"),
        (["--host", "0.0.0.0", "--api-key-file", str(tmp_path / "short")], "at least 16 ASCII"),
        (["--api-key-file", str(tmp_path / "none")], "can't read"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--batch", "0"], "--batch must be"),
        (["--timeout", "nan"], "--timeout must be"),
        (["--max-n", "40"], "--max-n is 40, and --queue 32"),
        (["--model", "nowhere"], "--model nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            serve.main(argv)
        assert "hush-hush" not in str(caught.value)
    monkeypatch.setenv(serve.KEY, KEY)
    assert serve.settle(serve.build_parser().parse_args(["--host", "::"]))[1:] == (KEY, 2 * 1024**2)
    with serve.listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="can't listen at 127.0.0.1 port"):
            serve.main(["--port", str(taken.getsockname()[1])])
    monkeypatch.setattr(serve, "_PACKAGES", ("fastapi", "no_such_package"))
    with pytest.raises(UserError, match="serving needs no_such_package: pip install"):
        serve.main([])
    assert KEY not in "".join(capsys.readouterr())
