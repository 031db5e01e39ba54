"""Writing files so that none is ever half-written."""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (same suffix); on success it takes ``path``'s place, else it is removed.

    What is written at the temporary path may be a file or a folder. A folder replaces an existing one.

    Raises:
        UserError: the folder of ``path`` can't be written, or ``path`` is a device or a pipe, which a file must not
            replace.
    """
    path = Path(path)
    if is_special(path):
        raise UserError(f"can't write {path}: it is a device or a pipe; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=".l2p-", dir=path.parent))  # short: names end at 255 bytes
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}; choose a writable folder") from error
    temporary = holder / path.name
    try:
        yield temporary
        if temporary.is_dir():
            if path.exists():
                os.replace(path, holder / "replaced")
            os.replace(temporary, path)
        else:
            with open(temporary, "rb") as file:  # on disk before the name appears
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def is_special(path: Path) -> bool:
    """Whether ``path`` is neither a file nor a folder, or one only by way of /proc, as /dev/stdout is."""
    try:
        mode = os.stat(path).st_mode
        if path.is_symlink() and os.readlink(path).startswith("/proc/"):
            return True
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def near_path(path: str) -> str:
    """``; did you mean ...?`` for a path that does not exist, or nothing."""
    wanted = Path(path)
    try:
        near = difflib.get_close_matches(wanted.name, os.listdir(wanted.parent), 1)
    except (OSError, ValueError):
        near = []
    return f"; did you mean {wanted.parent / near[0]}?" if near else ""


def regular(path: str | Path) -> str | Path:
    """``path`` itself; OSError where it is a pipe or a device, which might never answer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    return path
