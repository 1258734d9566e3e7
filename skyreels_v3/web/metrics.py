"""The metrics of GET /metrics, in Prometheus' format. No label contains text from a client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from skyreels_v3.web.queue import State

METHODS = ("GET", "HEAD", "POST", "DELETE")


class Metrics:
    """Counts requests, and jobs by state.

    Args:
        counts: returns the number of jobs in each state.
    """

    def __init__(self, counts: Callable[[], Mapping[State, int]]) -> None:
        self.registry = CollectorRegistry()
        self.counts = counts
        labels = ("method", "route")
        self.requests = Counter("skyreels_requests", "Answers sent", (*labels, "status"), registry=self.registry)
        self.seconds = Histogram("skyreels_request_seconds", "Seconds to answer", labels, registry=self.registry)
        self.registry.register(self)  # for `collect`

    def finished(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record a finished request."""
        method = method if method in METHODS else "other"
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(method, route).observe(seconds)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("skyreels_jobs", "Jobs in each state", labels=["state"])
        for state, number in self.counts().items():
            jobs.add_metric([state.value], number)
        yield jobs

    def text(self) -> bytes:
        return generate_latest(self.registry)
