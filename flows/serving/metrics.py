"""What the service counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from flows.serving.batching import Batcher
from flows.serving.served import InService

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class ServiceMetrics:
    """Counters of one service; every service has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("driftrec_requests", "Answered requests.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "driftrec_request_seconds", "Wall time of a request.", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.sizes = Histogram(
            "driftrec_batch_size", "Histories ranked together.", buckets=SIZES, registry=self.registry
        )
        self.model_seconds = Histogram(
            "driftrec_model_seconds", "Wall time of a batch in the model.", buckets=SECONDS, registry=self.registry
        )
        self.fallbacks = Counter(
            "driftrec_fallbacks", "Answers by recent popularity instead of the model.", registry=self.registry
        )
        self.waiting = Gauge("driftrec_waiting", "Requests in line.", registry=self.registry)
        self.swaps = Gauge("driftrec_champion_swaps", "Models replaced since the start.", registry=self.registry)
        self.failures = Gauge(
            "driftrec_champion_load_failures", "Models that could not be loaded.", registry=self.registry
        )
        self.champion = Gauge(
            "driftrec_champion",
            "The model in service.",
            ["method", "seed", "protocol", "stage"],
            registry=self.registry,
        )

    def batch(self, histories: int, seconds: float) -> None:
        """Note a ranked batch."""
        self.sizes.observe(histories)
        self.model_seconds.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Note an answered request; `path` is a route's, never the client's own, or the labels would grow for ever."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self, place: InService, batcher: Batcher) -> bytes:
        """Everything, as /metrics shows it."""
        job = place.current.job
        self.waiting.set(batcher.waiting)
        self.swaps.set(place.swaps)
        self.failures.set(place.failures)
        self.champion.clear()
        self.champion.labels(job.method, str(job.seed), job.protocol, str(job.stage)).set(1)
        return generate_latest(self.registry)
