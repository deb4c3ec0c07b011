"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        waiting: tells how many requests wait for a batch.
        cached_bytes: tells how much the features of pictures take that are kept.
        decoded_pixels: tells how many pixels are decoded.
    """

    def __init__(
        self, waiting: Callable[[], float], cached_bytes: Callable[[], float], decoded_pixels: Callable[[], float]
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, time, files; nothing where there is no /proc

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"crosstrim_{name}", words, labels, registry=self._registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"crosstrim_{name}", words, buckets=buckets, registry=self._registry)

        def gauge(name: str, words: str) -> Gauge:
            return Gauge(f"crosstrim_{name}", words, registry=self._registry)

        self.requests = counter("requests", "Chat requests that ended, by HTTP status.", "status")
        self.seconds = histogram("request_seconds", "Of a chat request in all.", _SECONDS)
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From a chat request's beginning to the first text of its answer.",
            _SECONDS,
        )
        self.batch_size = histogram("batch_size", "Requests that ran together.", (1, 2, 4, 8, 16, 32, 64))
        self.tokens = counter("generated_tokens", "Tokens of answers.")
        self.features = counter("image_features", "Image features of answered requests.", "what")
        self.escalated = counter("escalated_answers", "Answers that were made again because they were unsure.")
        self.unfinished = gauge("unfinished_requests", "Chat requests that are waiting or running.")
        gauge("waiting_requests", "Chat requests that no batch has taken yet.").set_function(waiting)
        gauge("decoded_pixels", "Of pictures of unfinished requests.").set_function(decoded_pixels)
        gauge("feature_cache_bytes", "Of pictures' features that are kept.").set_function(cached_bytes)

    def render(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
