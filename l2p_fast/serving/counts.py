"""What is counted, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .line import Batch, Line

_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server; `on_batch` and `on_answer` feed them."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self._answers = Counter("l2p_requests", "answered HTTP requests", ("route", "status"), **own)
        self._drawn = Counter("l2p_images_drawn", "drawn images", **own)
        self._left = Counter("l2p_images_cancelled", "images whose client left while they were drawn", **own)
        self._failed = Counter("l2p_images_failed", "images that could not be drawn", **own)
        self._waited = Histogram("l2p_wait_seconds", "of an image in the queue", buckets=_SECONDS, **own)
        self._seconds = Histogram("l2p_draw_seconds", "of a batch", buckets=_SECONDS, **own)
        self._batch = Histogram("l2p_batch_images", "drawn together", buckets=(1, 2, 4, 8, 16, 32), **own)
        self._queue = Gauge("l2p_queue_images", "images that wait", **own)
        self._drawing = Gauge("l2p_drawing_images", "images that are being drawn", **own)

    def on_batch(self, batch: Batch) -> None:
        """Count a batch that was drawn."""
        self._drawn.inc(batch.images - batch.left - batch.failed)
        self._failed.inc(batch.failed)
        self._left.inc(batch.left)
        for seconds in batch.waited:
            self._waited.observe(seconds)
        self._seconds.observe(batch.seconds)
        self._batch.observe(batch.images)

    def on_answer(self, route: str, status: int) -> None:
        """Count an answer; ``route`` is a pattern, never what a client wrote."""
        self._answers.labels(route, status).inc()

    def text(self, line: Line) -> bytes:
        """All of them, and how long the line is now."""
        self._queue.set(line.waiting)
        self._drawing.set(line.drawing)
        return generate_latest(self.registry)
