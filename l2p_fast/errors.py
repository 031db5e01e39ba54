"""What a user can mend: one exception, and how a command line shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user's: the message says what was wanted, what came and how to mend it."""


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
