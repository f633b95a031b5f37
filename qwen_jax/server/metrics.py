"""Prometheus metrics: counts of HTTP requests, and the statistics of service and engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from qwen_jax.generate.service import Service
from qwen_jax.generate.stats import Histogram

# Clients can request any path; all others are counted as "other", so that the number of series is
# bounded.
COUNTED_PATHS = (
    "/",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
)

# Field of `ServiceStats` -> metric name without prefix and unit, and description.
_HISTOGRAMS = {
    "first_token": ("time_to_first_token", "Seconds from submission to the first token"),
    "per_token": ("time_per_token", "Mean seconds between tokens of a request"),
    "request": ("request", "Seconds from submission to the end of a request"),
}
# Field of the engine's statistics -> description.
_ENGINE_GAUGES = {
    "pages_total": "Pages of the KV cache",
    "pages_free": "Free pages of the KV cache",
    "cached_pages": "Pages kept in the prefix cache",
}
_ENGINE_COUNTERS = {
    "prompt_tokens": "Prompt tokens",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "new_tokens": "Generated tokens",
    "preemptions": "Requests preempted because the KV cache was full",
}


class ServerMetrics:
    """Prometheus metrics of one server, in their own registry: a process can have several."""

    def __init__(self, service: Service):
        """Creates the metrics; the statistics of `service` are read whenever they are exported."""
        self._registry = CollectorRegistry()
        self._http = Counter(
            "qwen_http_requests", "HTTP requests", ["path", "status"], registry=self._registry
        )
        self._registry.register(_ServiceCollector(service))

    def count(self, path: str, status: int) -> None:
        """Counts a finished HTTP request by its path and HTTP status."""
        self._http.labels(path if path in COUNTED_PATHS else "other", str(status)).inc()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServiceCollector:
    """Prometheus collector that exports the statistics of a service and its engine."""

    def __init__(self, service: Service):
        self._service = service

    def describe(self) -> list[Metric]:
        """Returns an empty list, which spares a call of `collect` at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics with their current values."""
        stats = self._service.stats()
        yield GaugeMetricFamily("qwen_requests_waiting", "Requests in the queue", stats.waiting)
        yield GaugeMetricFamily("qwen_requests_running", "Requests being run", stats.running)
        yield CounterMetricFamily("qwen_requests_submitted", "Requests accepted", stats.submitted)
        yield CounterMetricFamily(
            "qwen_requests_refused", "Requests rejected because the queue was full", stats.refused
        )
        ended = CounterMetricFamily("qwen_requests_ended", "Requests ended", labels=["finish"])
        for finish, number in stats.finished.items():
            ended.add_metric([finish], number)
        yield ended
        for field, (name, description) in _HISTOGRAMS.items():
            yield _histogram(f"qwen_{name}_seconds", description, getattr(stats, field))
        for field, description in _ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"qwen_{field}", description, getattr(stats.engine, field))
        for field, description in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"qwen_{field}", description, getattr(stats.engine, field))


def _histogram(name: str, description: str, values: Histogram) -> HistogramMetricFamily:
    """Returns a distribution as a Prometheus histogram with cumulative buckets."""
    counts = itertools.accumulate(values.counts)
    bounds = [*map(str, values.bounds), "+Inf"]
    buckets = list(zip(bounds, counts, strict=True))
    return HistogramMetricFamily(name, description, buckets=buckets, sum_value=values.total)
