"""Statistics of a service as plain numbers, which any metrics library can export."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import time
import types
from collections.abc import Mapping
from typing import Any

from qwen_jax.generate.answer import AnswerState

# Upper bounds of the histogram buckets, in seconds. Time to the first token ranges from a cache hit
# to a long queue; time per token from a small model on an accelerator to a large one on a CPU.
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
REQUEST_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_RECENT = 64  # ended requests from which the rate of completion is estimated
_RETRY_S = (1.0, 60.0)  # limits of the time after which a refused client may retry


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Immutable histogram of times in seconds.

    Attributes:
      bounds: inclusive upper bounds of the buckets; one more bucket is unbounded.
      counts: number of values in each of the len(bounds) + 1 buckets, not cumulative.
      total: sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """Total number of values."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True)
class ServiceStats:
    """Totals of a service since its start, and its current load.

    Attributes:
      submitted: number of accepted requests.
      refused: number of requests refused because the queue was full.
      finished: number of ended requests by reason: "stop", "length", "cancelled", "refused" (by the
        engine) and "failed".
      waiting: requests that the engine has not started on.
      running: requests that the engine has started on.
      prompt_tokens: prompt tokens of ended requests.
      cached_tokens: those of them that were found in the prefix cache.
      new_tokens: output tokens of ended requests.
      first_token: seconds from submission to the first token, of ended requests with tokens.
      per_token: mean seconds between tokens, of ended requests with two or more tokens.
      request: seconds from submission to the end, of ended requests with tokens.
      engine: statistics of the engine (`EngineStats`).
    """

    submitted: int
    refused: int
    finished: Mapping[str, int]
    waiting: int
    running: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token: Histogram
    per_token: Histogram
    request: Histogram
    engine: Any


class _HistogramBuilder:
    """Histogram to which values are added; `bounds` as in `Histogram`."""

    def __init__(self, bounds: tuple[float, ...]):
        """Creates a histogram without values."""
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts one value, in seconds."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Histogram:
        """Returns the histogram of all values so far."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


class ServiceCounters:
    """Mutable counters behind `ServiceStats`; not thread-safe, the owner holds a lock.

    Attributes:
      submitted: number of accepted requests.
      refused: number of requests refused because the queue was full.
    """

    def __init__(self) -> None:
        """Creates counters at zero."""
        self.submitted = self.refused = 0
        self._finished = dict.fromkeys(("stop", "length", "cancelled", "refused", "failed"), 0)
        self._tokens: collections.Counter[str] = collections.Counter()
        self._first_token = _HistogramBuilder(FIRST_TOKEN_BOUNDS)
        self._per_token = _HistogramBuilder(PER_TOKEN_BOUNDS)
        self._request = _HistogramBuilder(REQUEST_BOUNDS)
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)

    def count_finished(self, answer: AnswerState, finish: str) -> None:
        """Counts an ended request with its tokens and times.

        Args:
          answer: the state of the request.
          finish: why it ended, a key of `ServiceStats.finished`.
        """
        self._finished[finish] += 1
        self._recent.append(time.monotonic())
        prompt_tokens = len(answer.request.prompt)
        self._tokens.update(
            prompt=prompt_tokens, cached=answer.cached_tokens, new=answer.new_tokens
        )
        if answer.first_token_at is None:
            return
        ended = answer.ended_at or time.monotonic()
        self._first_token.add(answer.first_token_at - answer.submitted_at)
        self._request.add(ended - answer.submitted_at)
        if answer.new_tokens > 1:
            self._per_token.add((ended - answer.first_token_at) / (answer.new_tokens - 1))

    def estimate_wait(self, waiting: int) -> float:
        """Returns the seconds in which `waiting` requests would end at the recent rate.

        The result is clipped to 1 to 60 s.
        """
        shortest, longest = _RETRY_S
        if len(self._recent) < 2:
            return shortest
        per_request = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        return min(max(waiting * per_request, shortest), longest)

    def snapshot(self, num_unsubmitted: int, engine: Any) -> ServiceStats:
        """Returns the current statistics.

        Args:
          num_unsubmitted: accepted requests that the engine has not received yet.
          engine: current statistics of the engine (`EngineStats`).
        """
        return ServiceStats(
            submitted=self.submitted,
            refused=self.refused,
            finished=types.MappingProxyType(dict(self._finished)),
            waiting=num_unsubmitted + engine.waiting,
            running=engine.running,
            prompt_tokens=self._tokens["prompt"],
            cached_tokens=self._tokens["cached"],
            new_tokens=self._tokens["new"],
            first_token=self._first_token.snapshot(),
            per_token=self._per_token.snapshot(),
            request=self._request.snapshot(),
            engine=engine,
        )
