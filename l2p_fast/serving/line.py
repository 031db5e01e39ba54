"""The line before one `Session`: one thread draws, and what waits together and fits together is drawn as one batch."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import UserError
from ..sampling.drawing import Drawing
from ..sampling.request import Request
from ..sampling.session import Progress, Session, settings_of

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class Full(Exception):
    """The line is as long as it may be; come back later."""


class Closed(Exception):
    """Nothing is drawn any more."""


class _Left(Exception):
    """Nobody waits for what is being drawn."""


@dataclass(eq=False)
class Ticket:
    """One image that is asked for.

    Attributes:
        request: filled by `Session.fill`.
        image, mask: that it starts from, upright.
        future: its `Drawing`, or what went wrong. Cancelling it is always possible and takes it out of the line, or
            ends its drawing after the present step.
        put: when it was put into the line, in seconds of `time.monotonic`.
        step, total: how far it is; 0 of 0 while it waits.
    """

    request: Request
    image: Image | None = None
    mask: Image | None = None
    future: Future[Drawing] = field(default_factory=Future)
    put: float = field(default_factory=time.monotonic)
    step: int = 0
    total: int = 0


@dataclass(frozen=True)
class Batch:
    """What is told of a batch that was drawn.

    Attributes:
        images: how many it had, of which ``left`` were cancelled meanwhile and ``failed`` can't be drawn.
        waited: seconds that each was in the line.
        seconds: that drawing took.
    """

    images: int
    left: int
    failed: int
    waited: list[float]
    seconds: float


class Line:
    """Use as a context: the thread that draws lives as long.

    Args:
        session: draws.
        most_waiting: images in the line at most, those being drawn not counted.
        most_together: images of a batch at most.
        most_pixels: of a batch of several at most.
        on_batch: told of each batch, in the thread that draws.
    """

    def __init__(
        self,
        session: Session,
        most_waiting: int = 32,
        most_together: int = 4,
        most_pixels: int = 1 << 22,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ):
        self.session, self.on_batch = session, on_batch
        self.most_waiting, self.most_together, self.most_pixels = most_waiting, most_together, most_pixels
        self._waiting: deque[Ticket] = deque()
        self._drawing: list[Ticket] = []
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def __enter__(self) -> Line:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Let them wait: all of them or none.

        Raises:
            Full: not all have a place.
            Closed: see `close`.
        """
        with self._changed:
            if not self.alive:
                raise Closed
            if len(self._prune()) + len(tickets) > self.most_waiting:
                raise Full
            self._waiting.extend(tickets)
            self._changed.notify()

    def ahead(self, ticket: Ticket) -> int:
        """How many images wait before this one, those being drawn not counted."""
        with self._changed:
            waiting = self._prune()
            return waiting.index(ticket) if ticket in waiting else 0

    @property
    def waiting(self) -> int:
        """Images in the line."""
        with self._changed:
            return len(self._prune())

    @property
    def drawing(self) -> int:
        """Images that are being drawn."""
        return len(self._drawing)

    @property
    def alive(self) -> bool:
        """Whether what is put into the line will be drawn."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Cancel what waits and what is being drawn; returns after the present step."""
        with self._changed:
            self._closing = True
            for ticket in (*self._waiting, *self._drawing):
                ticket.future.cancel()
            self._changed.notify()
        self._thread.join()

    def _prune(self) -> deque[Ticket]:
        """The line without those who left it."""
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.future.done())
        return self._waiting

    def _next(self) -> list[Ticket]:
        """The first in the line and those that can be drawn with it; waits for one. Empty: closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._prune())
            if self._closing:
                return []
            first = self._waiting[0].request
            most = min(self.most_together, self.most_pixels // (first.height * first.width))
            fitting = (ticket for ticket in self._waiting if settings_of(ticket.request) == settings_of(first))
            self._drawing = [ticket for ticket, _ in zip(fitting, range(max(1, most)), strict=False)]
            for ticket in self._drawing:
                self._waiting.remove(ticket)
            return self._drawing

    def _run(self) -> None:
        while tickets := self._next():
            start = time.monotonic()
            self._draw(tickets)
            self._drawing = []
            left = sum(ticket.future.cancelled() for ticket in tickets)
            failed = sum(ticket.future.exception() is not None for ticket in tickets if not ticket.future.cancelled())
            waited = [start - ticket.put for ticket in tickets]
            self.on_batch(Batch(len(tickets), left, failed, waited, time.monotonic() - start))

    def _draw(self, tickets: Sequence[Ticket]) -> None:
        def on_step(progress: Progress) -> None:
            for ticket in tickets:
                ticket.step, ticket.total = progress.step, progress.total
            if all(ticket.future.cancelled() for ticket in tickets):
                raise _Left

        try:
            requests = [ticket.request for ticket in tickets]
            images, masks = ([getattr(ticket, name) for ticket in tickets] for name in ("image", "mask"))
            drawings = self.session.draw_together(requests, on_step, images, masks)
        except _Left:
            return
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("an image was not drawn")
            waiting = [ticket for ticket in tickets if not ticket.future.cancelled()]
            if len(tickets) > 1:  # one that can't be drawn must not take the others with it
                for ticket in waiting:
                    self._draw([ticket])
            elif waiting:
                with contextlib.suppress(InvalidStateError):
                    tickets[0].future.set_exception(error)
            return
        for ticket, drawing in zip(tickets, drawings, strict=True):
            with contextlib.suppress(InvalidStateError):  # who leaves now has left
                ticket.future.set_result(drawing)
