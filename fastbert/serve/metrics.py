"""Prometheus metrics of a server."""

from collections.abc import Sequence
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

Kind = TypeVar("Kind", Counter, Gauge, Histogram)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """The metrics of one server, in its own registry; times are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._make(
            Counter, "requests", "Answers, by route and status.", ("route", "status")
        )
        self.request_seconds = self._make(
            Histogram, "request_seconds", "Time from a request's headers to its end.", ("route",),
            buckets=_SECONDS,
        )  # fmt: skip
        self.open_requests = self._make(Gauge, "open_requests", "Requests being answered.")
        self.left = self._make(Counter, "left", "Requests whose client left before the answer.")
        self.queue_sequences = self._make(
            Gauge, "queue_sequences", "Sequences that wait for the model."
        )
        self.queue_tokens = self._make(Gauge, "queue_tokens", "Tokens that wait for the model.")
        self.queue_seconds = self._make(
            Histogram, "queue_seconds", "Time that a request's first sequence waits for the model.",
            buckets=_SECONDS,
        )  # fmt: skip
        self.dropped = self._make(
            Counter, "dropped_sequences", "Sequences dropped because their client had left."
        )
        self.batch_sequences = self._make(
            Histogram, "batch_sequences", "Sequences in a batch.", buckets=_SIZES
        )
        self.batch_tokens = self._make(
            Histogram, "batch_tokens", "Tokens in a batch; the sum counts all computed tokens.",
            buckets=_TOKENS,
        )  # fmt: skip
        self.batch_seconds = self._make(
            Histogram, "batch_seconds", "The model's time for a batch.", buckets=_SECONDS
        )
        self.failed_batches = self._make(
            Counter, "failed_batches", "Batches on which the model failed."
        )

    def _make(
        self, kind: type[Kind], name: str, text: str, labels: Sequence[str] = (), **options: Any
    ) -> Kind:
        return kind(f"fastbert_{name}", text, labels, registry=self.registry, **options)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
