"""How fast a run is, how long it will take, how much memory it uses."""

from __future__ import annotations

import collections
import resource
import sys
import time
from collections.abc import Callable

import jax


class Throughput:
    """Units (tokens) per second over the last `window` steps.

    The first step only starts the clock, because it includes compilation.

    Args:
      window: how many of the last steps count.
      clock: seconds, monotonic; for tests.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.monotonic):
        self._marks: collections.deque[tuple[float, float]] = collections.deque(maxlen=window + 1)
        self._clock = clock
        self._total = 0.0

    def add(self, units: float) -> None:
        """Notes that a step of `units` has just ended."""
        if self._marks:
            self._total += units
        self._marks.append((self._clock(), self._total))

    def restart(self) -> None:
        """Forgets the window, after something that is not training: evaluation, a profile."""
        if self._marks:
            self._marks.clear()
            self._marks.append((self._clock(), self._total))

    def per_second(self) -> float | None:
        """Returns the rate, or None before the second step has ended."""
        if len(self._marks) < 2:
            return None
        (begin, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(end - begin, 1e-9)


class Eta:
    """Time to the last step, from the pace since the first call (pauses included).

    Args:
      total_steps: the step at which the run ends.
      clock: seconds, monotonic; for tests.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic):
        self.total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int) -> float | None:
        """Returns the seconds from `step` to the end, or None while the pace is unknown.

        The first call only starts the clock, so neither compilation nor the steps done before a
        resume count.
        """
        now = self._clock()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        done = step - self._first[0]
        if not done:
            return None
        return (now - self._first[1]) / done * max(0, self.total_steps - step)


def memory_stats() -> dict[str, float]:
    """Returns memory in GiB: the worst of the local devices where they tell, and the host's peak.

    Keys: memory/device_peak_gib, memory/device_used_gib, memory/device_limit_gib (accelerators
    only), memory/host_peak_gib (largest resident size of this process so far).
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
