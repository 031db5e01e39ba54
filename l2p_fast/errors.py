"""What a user can mend: one exception, and how a command line shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: the message says what was wanted, what came and how to mend it."""


def few(names: Iterable[Any], most: int = 3) -> str:
    """``a, b, c and 7 more``: as many names as a message of one line can hold."""
    names = [str(name) for name in names]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main``; a `UserError`, and what files and disks refuse, is one line on stderr, code 2."""
    try:
        code = main()
    except (UserError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
