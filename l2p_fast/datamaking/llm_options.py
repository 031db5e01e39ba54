"""Which language model a command line names: its options, and the model they make."""

from __future__ import annotations

import argparse

from ..errors import FieldError, UserError
from .llm import Endpoint, Local, Model


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `language_model`."""
    add = parser.add_argument
    add("--endpoint", metavar="URL", help="a server that speaks OpenAI's API, as in http://127.0.0.1:8000/v1")
    add("--llm", metavar="NAME", help="the model's name at the endpoint")
    add("--local", metavar="FOLDER", help="instead: a chat model of transformers on this machine")
    add("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key (OPENAI_API_KEY)")
    add("--concurrency", type=int, default=8, help="requests at a time (default: 8)")
    add("--per-minute", type=float, default=0, help="requests a minute at most (default: no limit)")
    add("--timeout", type=float, default=60, help="seconds for a request (default: 60)")
    add("--retries", type=int, default=5, help="of a request, with growing pauses (default: 5)")
    add("--temperature", type=float, default=1, help="of the model (default: 1)")
    add("--price-in", type=float, default=0, help="of a million tokens that are sent, for the line on the cost")
    add("--price-out", type=float, default=0, help="of a million tokens that come back")


def within(args: argparse.Namespace, name: str, least: float, most: float) -> None:
    """That a number lies in its range, where one is given.

    Raises:
        FieldError: it doesn't.
    """
    value = getattr(args, name)
    if value is not None and not least <= value <= most:
        raise FieldError(name, f"must be from {least:g} to {most:g}, got {str(value)[:40]}")


def language_model(args: argparse.Namespace, wanted: bool) -> Model | None:
    """The model that the options name, or None.

    Raises:
        UserError: two are named, or none though one is ``wanted``.
    """
    for name, least, most in (
        ("concurrency", 1, 1000), ("per_minute", 0, 1e6), ("timeout", 0.01, 1e5), ("retries", 0, 100),
        ("temperature", 0, 10), ("price_in", 0, 1e6), ("price_out", 0, 1e6),
    ):  # fmt: skip
        within(args, name, least, most)
    if args.endpoint and args.local:
        raise UserError("give --endpoint or --local, not both")
    if args.local:
        return Local(args.local, temperature=args.temperature)
    if args.endpoint:
        if not args.llm:
            raise UserError("--endpoint needs --llm, the model's name there")
        return Endpoint(
            args.endpoint, args.llm, args.key_env, args.concurrency, args.per_minute, args.timeout, args.retries,
            args.temperature, (args.price_in, args.price_out),
        )  # fmt: skip
    if wanted:
        raise UserError("this needs a language model: --endpoint URL --llm NAME, or --local FOLDER")
    return None
