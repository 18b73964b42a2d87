"""The numbers at /metrics, in Prometheus' form. A registry of its own, so that nothing of the process gets in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Counted(Protocol):
    """What the worker counts."""

    tokens: int

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class _WorkerNumbers(Collector):
    """Reads the worker's own counts when asked, so that they cannot drift apart."""

    def __init__(self, worker: Counted) -> None:
        self.worker = worker

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("miniglm_sequences_running", "Sequences in the batch.", self.worker.running)
        yield GaugeMetricFamily("miniglm_requests_waiting", "Sequences in the queue.", self.worker.waiting)
        yield CounterMetricFamily("miniglm_tokens_generated", "Tokens made in all.", self.worker.tokens)


class Metrics:
    """Counts requests and measures times.

    Args:
        worker: what makes the tokens; None where the model is behind another server.
    """

    def __init__(self, worker: Counted | None) -> None:
        self.registry = CollectorRegistry()
        if worker is not None:
            self.registry.register(_WorkerNumbers(worker))
        self._requests = Counter(
            "miniglm_http_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self._duration = Histogram(
            "miniglm_http_request_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )
        self._first = Histogram(
            "miniglm_first_text_seconds",
            "From a request's head to its answer's first text.",
            registry=self.registry,
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request is answered. `route` is one of a few names, never a path that a client chose."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def first_text(self, seconds: float) -> None:
        """A request's first text is there."""
        self._first.observe(seconds)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text form."""
        return generate_latest(self.registry)
