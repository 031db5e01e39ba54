"""Serve images over HTTP: ``python -m l2p_fast.serve --model FILE``, OpenAI's API of images on 127.0.0.1:8000.

The port is taken and all options are checked before anything heavy is loaded. Ctrl-C, or SIGTERM, stops it: what is
being drawn is finished first, for ``--grace`` seconds at most.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from .errors import FieldError, Parser, UserError, option_names, run_cli
from .sampling.facts import check_lora, check_text_encoder, find_model
from .sampling.request import Setup
from .startup import all_stays, hide_unused

KEY = "L2P_API_KEY"  # the environment's variable that holds the API key
SHORTEST_KEY = 16
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="l2p serve", description="Serve images over HTTP, by OpenAI's API.")
    add = parser.add_argument
    add("--model", default="tiny-1k", help="file, folder or pipeline folder (default: the bundled tiny-1k)")
    add("--text-encoder", help="folder or hub id with text_encoder/ and tokenizer/")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="a LoRA over the model; may be given several times")
    for name, usual in (
        ("dtype", "auto"),
        ("device", "auto"),
        ("attention", "auto"),
        ("quantize", "none"),
        ("offload", "none"),
    ):
        add(f"--{name}", default=usual, help=f"as for l2p sample (default: {usual})")
    add("--compile", action="store_true", help="torch.compile the transformer's blocks")
    add("--head-memory-mb", type=float, help="working memory of the head")
    add("--host", default="127.0.0.1", help="address to listen at; any but this machine's own needs an API key")
    add("--port", type=int, default=8000, help="default: 8000; 0: one that is free")
    add("--api-key-file", metavar="FILE", help=f"holds the API key (default: the environment's {KEY}, if it is set)")
    add("--max-megapixels", type=float, metavar="MP", help="of an image (default: twice the model's own size)")
    add("--max-steps", type=int, default=100, metavar="N", help="of an image (default: 100)")
    add("--max-n", type=int, default=10, metavar="N", help="images of a request (default: 10)")
    add("--queue", type=int, default=32, metavar="N", help="images that may wait; more are refused (default: 32)")
    add("--batch", type=int, default=4, metavar="N", help="images that are drawn together at most (default: 4)")
    add("--max-upload-mb", type=float, default=64, metavar="MB", help="of a request with files (default: 64)")
    add("--keep-images", type=int, default=200, metavar="N", help="files that are kept for URLs (default: 200)")
    add("--keep-mb", type=float, default=2048, metavar="MB", help="their size in all (default: 2048)")
    add("--timeout", type=float, default=60, metavar="S", help="for a request to arrive, or a part of an answer to go")
    add("--grace", type=int, default=30, metavar="S", help="to finish what is being drawn when stopped (default: 30)")
    return parser


_BOUNDS = {
    "port": (0, 65535), "max_megapixels": (1e-4, 1e6), "max_steps": (1, 10_000), "max_n": (1, 1000),
    "queue": (1, 100_000), "batch": (1, 1000), "max_upload_mb": (0.01, 1e5), "keep_images": (1, 1_000_000),
    "keep_mb": (1, 1e9), "timeout": (0.1, 1e5), "grace": (0, 1e5),
}  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """That every number is one that makes sense.

    Raises:
        FieldError: one doesn't.
    """
    for name, (least, most) in _BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise FieldError(name, f"must be from {least:g} to {most:g}, got {value:g}")
    if args.max_n > args.queue:
        raise FieldError("max_n", f"is {args.max_n}, and {{queue}} {args.queue}: such a request would never be taken")


def read_key(file: str | None) -> str | None:
    """The API key of ``file``, else of the environment; None: there is none. It is never part of a message.

    Raises:
        UserError: a file that can't be read, or a key that can't be sent or is too short.
    """
    if file is None:
        key, where = os.environ.get(KEY), KEY
    else:
        try:
            key, where = Path(file).read_text(encoding="utf-8").strip(), file
        except (OSError, ValueError) as error:
            raise UserError(f"--api-key-file: can't read {file} ({type(error).__name__})") from None
    if key is None:
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"the API key of {where} must be at least {SHORTEST_KEY} ASCII characters without spaces; make one with "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, and doesn't listen yet.

    Raises:
        UserError: no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"can't listen at {host} port {port}: {error}; try another --port") from None
    return sock


def settle(args: argparse.Namespace) -> tuple[Setup, str | None, int]:
    """The setup, the API key and how many pixels an image may have: checked without loading anything."""
    check(args)
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"serving needs {package}: pip install 'l2p_fast[serve]'") from None
    from .serving.guard import is_loopback

    key = read_key(args.api_key_file)
    if key is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} is open to other machines, so an API key is needed: --api-key-file, or {KEY}"
        )
    setup = Setup.from_dict(vars(args) | {"lora": tuple(args.lora or ())})
    model = find_model(setup.model)
    check_text_encoder(setup.text_encoder, model)
    for lora in setup.lora:
        check_lora(lora)
    pixels = 2 * model.native_size**2 if args.max_megapixels is None else int(args.max_megapixels * 1e6)
    return setup, key, pixels


def run(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup, key, pixels = settle(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what is below is left in order
    with listen(args.host, args.port) as sock, tempfile.TemporaryDirectory(prefix="l2p-serve-") as folder:
        with all_stays():
            import uvicorn

            from .sampling.session import Session
            from .serving.api import Api
            from .serving.counts import Metrics
            from .serving.limits import Limits
            from .serving.line import Line
            from .serving.store import ImageStore

            session = Session.load(setup)
        session.pipeline.set_progress_bar_config(disable=True)
        for line in session.report:
            print(line)
        limits = Limits(
            pixels, args.max_steps, args.max_n, int(args.max_upload_mb * 2**20), images=args.keep_images,
            bytes=int(args.keep_mb * 2**20), seconds=args.timeout,
        )  # fmt: skip
        metrics, name = Metrics(), Path(session.name).stem if Path(session.name).is_file() else Path(session.name).name
        store = ImageStore(Path(folder), limits.images, limits.bytes)
        with Line(session, args.queue, args.batch, pixels, metrics.on_batch) as line:
            app = Api(line, store, limits, name, metrics, key).app()
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none",
                http="h11", timeout_graceful_shutdown=args.grace, limit_concurrency=512,
            )  # fmt: skip
            sock.listen()  # who comes from here on is answered
            host, port = sock.getsockname()[:2]
            print(
                f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port} (its API: /docs)", flush=True
            )
            uvicorn.Server(config).run([sock])
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) until it is stopped.

    Raises:
        UserError: a wrong argument or file.
    """
    with option_names():
        return run(argv)


if __name__ == "__main__":
    hide_unused()
    run_cli(main)
