"""What a service has done, as plain numbers that any metrics library can export."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import time
import types
from collections.abc import Mapping
from typing import Any

from qwen_jax.generate.answer import Job

# Upper bounds in seconds. To the first token: from a cache hit to a long queue; per token: from a
# small model on an accelerator to a large one on a CPU.
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
REQUEST_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_RECENT = 64  # ends of requests by which waiting times are judged
_RETRY_S = (1.0, 60.0)  # shortest and longest time that a refused client is asked to wait


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A histogram.

    Attributes:
      bounds: upper bounds, inclusive; one more bucket has no bound.
      counts: of each bucket, len(bounds) + 1, not accumulated.
      total: sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True)
class ServiceStats:
    """A service since its start.

    Attributes:
      submitted: requests taken.
      refused: requests refused because too many waited.
      finished: requests ended, by "stop", "length", "cancelled", "refused" (by the engine) and
        "failed".
      waiting: requests that the engine has not started on; running: those it has.
      prompt_tokens, cached_tokens, new_tokens: of ended requests.
      first_token, per_token, request: seconds from submission to the first token, between tokens
        (the mean of each request), from submission to the end; ended requests that had tokens.
      engine: the engine's own numbers.
    """

    submitted: int
    refused: int
    finished: Mapping[str, int]
    waiting: int
    running: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token: Distribution
    per_token: Distribution
    request: Distribution
    engine: Any


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]):
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._total)


class Counters:
    """Counts under the lock of whoever owns it."""

    def __init__(self):
        self.submitted = self.refused = 0
        self._finished = dict.fromkeys(("stop", "length", "cancelled", "refused", "failed"), 0)
        self._tokens = collections.Counter()
        self._first_token = _Histogram(FIRST_TOKEN_BOUNDS)
        self._per_token = _Histogram(PER_TOKEN_BOUNDS)
        self._request = _Histogram(REQUEST_BOUNDS)
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)

    def finished(self, job: Job, finish: str) -> None:
        """Counts a request that has ended."""
        self._finished[finish] += 1
        self._recent.append(time.monotonic())
        self._tokens.update(prompt=len(job.request.prompt), cached=job.cached, new=job.new)
        if job.first_at is None:
            return
        ended = job.ended_at or time.monotonic()
        self._first_token.add(job.first_at - job.submitted_at)
        self._request.add(ended - job.submitted_at)
        if job.new > 1:
            self._per_token.add((ended - job.first_at) / (job.new - 1))

    def seconds_until_free(self, waiting: int) -> float:
        """In how many seconds so many requests should be done, at the rate of the latest."""
        shortest, longest = _RETRY_S
        if len(self._recent) < 2:
            return shortest
        each = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return min(max(waiting * each, shortest), longest)

    def snapshot(self, new: int, engine: Any) -> ServiceStats:
        """Everything as of now; `new` requests wait for the engine to take them."""
        return ServiceStats(
            submitted=self.submitted,
            refused=self.refused,
            finished=types.MappingProxyType(dict(self._finished)),
            waiting=new + engine.waiting,
            running=engine.running,
            prompt_tokens=self._tokens["prompt"],
            cached_tokens=self._tokens["cached"],
            new_tokens=self._tokens["new"],
            first_token=self._first_token.snapshot(),
            per_token=self._per_token.snapshot(),
            request=self._request.snapshot(),
            engine=engine,
        )
