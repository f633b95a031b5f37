"""Throughput, remaining time and memory use of a run."""

from __future__ import annotations

import collections
import resource
import sys
import time
from collections.abc import Callable

import jax


class Throughput:
    """Moving average of units (tokens) per second over the most recent steps.

    The first step only starts the clock, because it includes compilation.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.monotonic):
        """Starts without steps.

        Args:
          window: number of most recent steps to average over.
          clock: returns monotonic seconds; replaced in tests.
        """
        self._marks: collections.deque[tuple[float, float]] = collections.deque(maxlen=window + 1)
        self._clock = clock
        self._total = 0.0

    def add(self, units: float) -> None:
        """Records that a step which processed `units` units (such as tokens) has just ended."""
        if self._marks:
            self._total += units
        self._marks.append((self._clock(), self._total))

    def restart(self) -> None:
        """Starts a new window now, so that time spent on an evaluation or a profile is left out."""
        if self._marks:
            self._marks.clear()
            self._marks.append((self._clock(), self._total))

    def per_second(self) -> float | None:
        """Returns units per second, or None before the second step has ended."""
        if len(self._marks) < 2:
            return None
        (begin, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(end - begin, 1e-9)


class Eta:
    """Estimate of the time to the last step, from the average pace since the first call.

    Pauses, such as evaluations, are part of the pace.

    Attributes:
      total_steps: last step of the run.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic):
        """Starts without a pace.

        Args:
          total_steps: last step of the run.
          clock: returns monotonic seconds; replaced in tests.
        """
        self.total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int) -> float | None:
        """Returns the estimated seconds from `step` to the end, or None while the pace is unknown.

        The first call only starts the clock, so neither compilation nor steps before a resume
        affect the pace.
        """
        now = self._clock()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        done = step - self._first[0]
        if not done:
            return None
        return (now - self._first[1]) / done * max(0, self.total_steps - step)


def memory_stats() -> dict[str, float]:
    """Returns memory use in GiB by metric name.

    Names: memory/device_peak_gib, memory/device_used_gib, memory/device_limit_gib (the largest of
    the local devices; absent where devices do not report memory, such as CPUs) and
    memory/host_peak_gib (peak resident size of this process).
    """
    gib = 1024.0**3
    found: dict[str, float] = {}
    names = {
        "peak_bytes_in_use": "memory/device_peak_gib",
        "bytes_in_use": "memory/device_used_gib",
        "bytes_limit": "memory/device_limit_gib",
    }
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        for key, name in names.items():
            if key in stats:
                found[name] = max(found.get(name, 0.0), stats[key] / gib)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**found, "memory/host_peak_gib": peak / gib}
