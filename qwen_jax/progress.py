"""Formatting of numbers and durations, and progress logs with a remaining time."""

from __future__ import annotations

import time

from absl import logging


def format_count(value: float) -> str:
    """Returns a count with three or four digits: 950, 12.3k, 4.56M, 7.89B, 1.23T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == "k" else size)
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: 45s, 3m 20s, 5h 07m, 2d 04h."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600:02d}h"


class Progress:
    """Logger of the progress of long work, with its rate and remaining time.

    The format is `label: done of total unit (percent), rate, time left`.

    Args:
      label: name of the work.
      total: amount of work, in `unit`; None if unknown (then no percentage and no time left).
      unit: what is counted; "B" is shown in megabytes, or gigabytes for large totals.
      every: minimum number of seconds between lines.
    """

    def __init__(self, label: str, total: int | None, unit: str, every: float = 10.0):
        self._label, self._total, self._every = label, total, every
        self._scale, self._unit = 1.0, unit
        if unit == "B":
            large = total is not None and total >= 1e10
            self._scale, self._unit = (1e9, "GB") if large else (1e6, "MB")
        self._done = self._skipped = 0
        self._start = self._last = time.monotonic()

    def skip(self, amount: int) -> None:
        """Counts work that was already done: it changes the position but not the rate."""
        self._skipped += amount
        self.add(amount)

    def add(self, amount: int) -> None:
        """Counts `amount` units as done, and logs if the last line is `every` seconds old."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        rate = (self._done - self._skipped) / (now - self._start)
        line = f"{self._label}: {self._done / self._scale:.4g} {self._unit}"
        speed = f"{rate / self._scale:.3g} {self._unit}/s"
        if self._total:
            left = (
                format_duration((self._total - self._done) / rate) if rate > 0 else "unknown time"
            )
            share = f"{100 * self._done / self._total:.0f} %"
            total = f"{self._total / self._scale:.4g} {self._unit}"
            logging.info("%s of %s (%s), %s, %s left", line, total, share, speed, left)
        else:
            logging.info("%s, %s", line, speed)
