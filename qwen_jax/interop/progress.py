"""How far a long copy is, for the log: share, speed and time left, at most every few seconds."""

from __future__ import annotations

import time

from absl import logging


class Progress:
    """Counts bytes and logs "load 3.1 of 15.4 GB, 1.2 GB/s, 10 s left".

    Args:
      what: first word of the line.
      total: bytes expected in all.
      every: seconds between lines.
    """

    def __init__(self, what: str, total: int, every: float = 5.0):
        self._what, self._total, self._every = what, total, every
        self._done = 0
        self._start = self._last = time.monotonic()

    def add(self, nbytes: int) -> None:
        """Counts `nbytes` more and logs when the last line is old enough."""
        self._done += nbytes
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        speed = self._done / (now - self._start)
        logging.info(
            "%s %.1f of %.1f GB, %.2f GB/s, %.0f s left",
            self._what, self._done / 1e9, self._total / 1e9, speed / 1e9,
            (self._total - self._done) / speed,
        )  # fmt: skip
