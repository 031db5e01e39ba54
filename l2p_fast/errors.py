"""Mistakes that the user can fix: the exceptions for them, and how a command line shows one."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: the message says what was wanted, what came and how to mend it."""


class FieldError(UserError):
    """A `UserError` about one named value, so that each surface can call values by its own names.

    Attributes:
        field: the name, such as ``steps``.
        problem: the rest of the message, such as ``must be at least 1, got 0; try 1``; other fields stand in it as
            ``{name}``.
    """

    def __init__(self, field: str, problem: str):
        self.field, self.problem = field, problem
        super().__init__(self.worded(lambda name: name))

    def worded(self, name: Callable[[str], str]) -> str:
        """The message with each field called what ``name`` makes of it."""
        return f"{name(self.field)} {re.sub(r'{([a-z][a-z_]*)}', lambda found: name(found[1]), self.problem)}"


@contextlib.contextmanager
def option_names() -> Iterator[None]:
    """In this context a `FieldError` becomes a `UserError` that calls fields as a command line does: ``--max-n``."""
    try:
        yield
    except FieldError as error:
        raise UserError(error.worded(lambda name: "--" + name.replace("_", "-"))) from error


def few(names: Iterable[Any], most: int = 3) -> str:
    """``a, b, c and 7 more``: as many names as a message of one line can hold."""
    names = [str(name) for name in names]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a `UserError` too: one line instead of the whole usage. Options are not abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def one_line(text: str) -> str:
    """``text`` as a line that is safe to print: what is in a stranger's file name must not steer the terminal."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main``; a `UserError`, and what files and disks refuse, is one line on stderr, code 2."""
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal can't spell is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except (UserError, OSError) as error:
        print("error: " + one_line(str(error)), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
