"""One log line every few seconds for long work: how far, how fast, how long still."""

from __future__ import annotations

import time

from absl import logging


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Progress:
    """Logs `label: done of total unit (percent), rate, time left` at most every `every` seconds.

    Args:
      label: what is being done.
      total: amount of work, in `unit`; None when unknown (then no percentage and no time left).
      unit: what is counted; "B" is shown in megabytes.
      every: seconds between lines.
    """

    def __init__(self, label: str, total: int | None, unit: str, every: float = 10.0):
        self._label, self._total, self._every = label, total, every
        self._scale, self._unit = (1e6, "MB") if unit == "B" else (1, unit)
        self._done = self._skipped = 0
        self._start = self._last = time.monotonic()

    def skip(self, amount: int) -> None:
        """Counts work found done already: it moves the position but not the rate."""
        self._skipped += amount
        self.add(amount)

    def add(self, amount: int) -> None:
        """Counts `amount` units as done and logs when a line is due."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        rate = (self._done - self._skipped) / (now - self._start)
        line = f"{self._label}: {self._done / self._scale:.4g} {self._unit}"
        speed = f"{rate / self._scale:.3g} {self._unit}/s"
        if self._total:
            left = _duration((self._total - self._done) / rate) if rate > 0 else "unknown time"
            share = f"{100 * self._done / self._total:.0f} %"
            total = f"{self._total / self._scale:.4g} {self._unit}"
            logging.info("%s of %s (%s), %s, %s left", line, total, share, speed, left)
        else:
            logging.info("%s, %s", line, speed)
