"""What Prometheus is told: counts of HTTP requests, and the numbers of the service and engine."""

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
from qwen_jax.generate.stats import Distribution, ServiceStats

# Anything may be asked for; only these are told apart.
PATHS = ("/", "/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")

_HISTOGRAMS = {
    "first_token": ("time_to_first_token", "Seconds from submission to the first token"),
    "per_token": ("time_per_token", "Mean seconds between tokens of a request"),
    "request": ("request", "Seconds from submission to the end of a request"),
}
_ENGINE = {
    "pages_total": "Pages of the key-value cache",
    "pages_free": "Pages that are free",
    "cached_pages": "Pages kept for prompts that begin alike",
}


class Metrics:
    """A registry of its own, so that several servers can live in one process."""

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._http = Counter(
            "qwen_http_requests", "HTTP requests", ["path", "status"], registry=self._registry
        )
        self._registry.register(_Collector(service))

    def count(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has been answered."""
        del seconds
        self._http.labels(path if path in PATHS else "other", str(status)).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Collector:
    def __init__(self, service: Service):
        self._service = service

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks the service for nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The numbers of now."""
        stats = self._service.stats()
        yield GaugeMetricFamily("qwen_requests_waiting", "Requests that wait", stats.waiting)
        yield GaugeMetricFamily("qwen_requests_running", "Requests that run", stats.running)
        yield CounterMetricFamily("qwen_requests_submitted", "Requests taken", stats.submitted)
        yield CounterMetricFamily("qwen_requests_refused", "Requests refused", stats.refused)
        ended = CounterMetricFamily("qwen_requests_ended", "Requests ended", labels=["finish"])
        for finish, number in stats.finished.items():
            ended.add_metric([finish], number)
        yield ended
        yield from self._tokens(stats)
        for field, (name, text) in _HISTOGRAMS.items():
            yield _histogram(f"qwen_{name}_seconds", text, getattr(stats, field))
        for field, text in _ENGINE.items():
            yield GaugeMetricFamily(f"qwen_{field}", text, getattr(stats.engine, field))
        yield CounterMetricFamily(
            "qwen_preemptions", "Requests put back for want of pages", stats.engine.preemptions
        )

    def _tokens(self, stats: ServiceStats) -> Iterator[Metric]:
        for field in ("prompt_tokens", "cached_tokens", "new_tokens"):
            name = field.replace("_", " ").capitalize()
            yield CounterMetricFamily(f"qwen_{field}", name, getattr(stats.engine, field))


def _histogram(name: str, text: str, found: Distribution) -> HistogramMetricFamily:
    counts = itertools.accumulate(found.counts)
    bounds = [*map(str, found.bounds), "+Inf"]
    buckets = list(zip(bounds, counts, strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=found.total)
