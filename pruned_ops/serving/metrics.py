"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pruned_ops.serving.batcher import Batcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: a short text takes one or two milliseconds, and a client rarely waits for more than a minute.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TOKENS = tuple(float(1 << power) for power in range(4, 17))


class Metrics:
    """The counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "pruned_ops", "registry": self.registry}
        self._requests = Counter(
            "requests", "Requests that were answered or refused.", ["route", "status"], **named
        )
        self._seconds = Histogram(
            "request_seconds", "Seconds from a request to its answer.", ["route"], buckets=_SECONDS, **named
        )
        self._texts = Counter("texts", "Texts that were computed.", ["model"], **named)
        self._tokens = Counter("tokens", "Tokens that were computed, without padding.", ["model"], **named)
        self._batch_tokens = Histogram(
            "batch_tokens", "Tokens of a batch, without padding.", ["model"], buckets=_TOKENS, **named
        )
        self._batch_seconds = Histogram(
            "batch_seconds", "Seconds that a batch took.", ["model"], buckets=_SECONDS, **named
        )
        self._dropped = Counter("dropped_texts", "Texts that nobody waited for any more.", **named)
        self._waiting_tokens = Gauge("waiting_tokens", "Tokens that wait for their batch.", **named)
        self._waiting = Gauge("waiting_requests", "Requests that wait or are computed.", **named)

    def watch(self, batcher: Batcher) -> None:
        """Tell how much waits in this batcher, whenever somebody asks."""
        self._waiting_tokens.set_function(lambda: batcher.waiting_tokens)
        self._waiting.set_function(lambda: batcher.waiting_requests)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request. route: one of the server's own, so that nobody can make more of them."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def computed(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch."""
        self._texts.labels(model).inc(texts)
        self._tokens.labels(model).inc(tokens)
        self._batch_tokens.labels(model).observe(tokens)
        self._batch_seconds.labels(model).observe(seconds)

    def dropped(self, texts: int) -> None:
        """Count texts whose client left before they were computed."""
        self._dropped.inc(texts)

    def text(self) -> bytes:
        """All counts."""
        return generate_latest(self.registry)
