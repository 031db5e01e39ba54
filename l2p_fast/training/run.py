"""The folder of a run: one run at a time, and where it goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from . import state as checkpoints
from .parallel import Workers
from .shards import Damaged
from .state import RunState

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """The folder of a run, made if need be and held for this one; use as a context, on all processes.

    The lock is the kernel's: it ends with the process that holds it, however that ends.

    Raises:
        UserError: it can't be written, or another run is in it.
    """

    def __init__(self, path: str, workers: Workers):
        if not path:
            raise UserError("no folder for the run; give run=FOLDER")
        self.path, self.workers = Path(path), workers
        self._lock = self._identity = None

    def __enter__(self) -> RunFolder:
        failure = None
        if self.workers.first:
            try:
                self._take()
            except UserError as error:
                failure = str(error)
        failure = self.workers.share(failure)
        if failure:
            self.__exit__()
            raise UserError(failure)
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._identity = _identity(self.path)
            self._lock = open(self.path / LOCK, "a+")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"can't write {self.path}: {reason}; choose a writable folder for the run") from error
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            raise UserError(
                f"another run ({self._lock.read(200).strip() or 'of an unknown process'}) is in {self.path}; "
                "wait for its end, or give another folder: run=FOLDER"
            ) from error
        except OSError:  # a file system without locks
            return
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def check(self) -> None:
        """Raises UserError where the folder was removed, moved or replaced since."""
        if self._identity is not None and self._identity != _identity(self.path):
            raise UserError(f"the run's folder {self.path} was removed or moved; start the run again")

    def last(self) -> Path | None:
        """The last complete checkpoint."""
        return next(reversed(checkpoints.complete(self.path)), None)

    def find(self, resume: str) -> tuple[Path | None, RunState, list[str]]:
        """(the checkpoint to go on from, its state, what to say about damaged ones); all processes take part.

        ``resume``: ``auto`` the last of the run that is whole, ``none``, or a path.

        Raises:
            UserError: the run has later checkpoints than that, or none that is whole.
        """
        found = checkpoints.complete(self.path)
        if resume == "auto":
            return self._newest(found)
        place = None if resume == "none" else Path(resume)
        if found and (place is None or found[-1].name > place.name):
            raise UserError(f"{self.path} holds a later checkpoint ({found[-1].name}); give another run=FOLDER")
        return place, RunState() if place is None else checkpoints.check(place, self.workers), []

    def _newest(self, found: list[Path]) -> tuple[Path | None, RunState, list[str]]:
        damaged: list[tuple[Path, str]] = []
        for place in reversed(found):
            try:
                state = checkpoints.check(place, self.workers)
            except Damaged as error:
                damaged.append((place, str(error)))
                continue
            if self.workers.first:
                for other, _ in damaged:
                    _set_aside(other)
            self.workers.wait()
            return place, state, [f"{why}; it is set aside, and {place.name} is used" for _, why in damaged]
        if damaged:
            raise UserError(f"{damaged[0][1]}; no other checkpoint of {self.path} is whole: give another run=FOLDER")
        return None, RunState(), []

    @contextlib.contextmanager
    def telling_what_is_kept(self) -> Iterator[None]:
        """Add to an error of a full disk what of the run is safe."""
        try:
            yield
        except (UserError, OSError) as error:
            if not any(getattr(e, "errno", None) in FULL for e in _causes(error)):
                raise
            last = self.last()
            kept = f"{last} is kept" if last else "no checkpoint was kept"
            raise UserError(f"{error}; {kept}; make room and start again") from error


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _set_aside(place: Path) -> None:
    """Give a damaged checkpoint a name that is no checkpoint's."""
    number = 1
    while (away := place.with_name(f"{place.name}.damaged-{number}")).exists():
        number += 1
    os.replace(place, away)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
