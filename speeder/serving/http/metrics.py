"""Prometheus metrics: requests, times, batches, queues, and the process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of their own; also the batcher's observer."""

    def __init__(self):
        disable_created_metrics()  # a creation time per label set would double the text, and is of no use here
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        make = {"registry": self.registry}
        self.requests = Counter(
            "speeder_requests",
            "Answered requests; 499: the client disconnected.",
            ["route", "method", "status"],
            **make,
        )
        self.latency = Histogram(
            "speeder_request_seconds",
            "From the request's head to the end of the answer.",
            ["route"],
            buckets=_SECONDS,
            **make,
        )
        self.in_flight = Gauge("speeder_requests_in_flight", "Requests being answered.", **make)
        self.refused = Counter(
            "speeder_refused",
            "Requests with a full queue, a missed deadline, or a client that disconnected.",
            ["lane", "reason"],
            **make,
        )
        self.batch_size = Histogram(
            "speeder_batch_size", "Requests per batch.", ["lane"], buckets=_SIZES, **make
        )
        self.batch_seconds = Histogram(
            "speeder_batch_seconds", "Time of a batch in the model.", ["lane"], buckets=_SECONDS, **make
        )
        self.queue_depth = Gauge("speeder_queue_depth", "Requests that wait for the model.", ["lane"], **make)
        self.ready = Gauge("speeder_ready", "1 while the server accepts requests.", **make)
        self.items = Gauge("speeder_catalogue_items", "Items that can be recommended.", **make)

    def watch_queue(self, lane: str, depth: Callable[[], int]) -> None:
        """Measure a lane's depth whenever the metrics are read."""
        self.queue_depth.labels(lane).set_function(depth)

    def batch(self, lane: str, size: int, seconds: float) -> None:
        """Record a batch of the batcher."""
        self.batch_size.labels(lane).observe(size)
        self.batch_seconds.labels(lane).observe(seconds)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Record an answered request."""
        self.requests.labels(route, method, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
