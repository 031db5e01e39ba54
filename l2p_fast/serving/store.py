"""Drawn images as files, under random names and for a while."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from ..sampling.drawing import FORMATS, Drawing


class ImageStore:
    """Files of a folder of its own; beyond its bounds the oldest go. Threads may share it.

    Args:
        folder: there, and empty.
        images, bytes: how many are kept at most, and their size in all; the newest is, whatever its size.
    """

    def __init__(self, folder: Path, images: int, bytes: int):
        self.folder, self.images, self.bytes = folder, images, bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, drawing: Drawing, format: str) -> str:
        """Write ``drawing`` as png, jpg or webp; returns its name.

        Raises:
            UserError: no room on the disk.
        """
        name = secrets.token_hex(16) + FORMATS[format]
        path = self.folder / name
        drawing.save(path, format)
        with self._lock:
            self._sizes[name] = path.stat().st_size
            while len(self._sizes) > self.images or (len(self._sizes) > 1 and sum(self._sizes.values()) > self.bytes):
                old, _ = self._sizes.popitem(last=False)
                (self.folder / old).unlink(missing_ok=True)
        return name

    def encode(self, drawing: Drawing, format: str) -> bytes:
        """The file of ``drawing`` as `keep` would write it, which is not kept."""
        path = self.folder / f"once-{secrets.token_hex(16)}{FORMATS[format]}"
        try:
            drawing.save(path, format)
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    def find(self, name: str) -> Path | None:
        """The file that `keep` gave this name; None: it has gone, or never was."""
        with self._lock:
            return self.folder / name if name in self._sizes else None
