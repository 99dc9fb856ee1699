"""What a server counts, in Prometheus' text format."""

import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.batcher import Batcher

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
UNKNOWN = "unknown"  # the adapter of a request whose model is none
DISCONNECTED = 499  # the status of a request whose client went away first


class Metrics:
    """The registry of one server. Adapter labels are known names only, so no client can make new ones."""

    def __init__(self, batcher: Batcher, base: str):
        self._bank, self._constant = batcher.bank, frozenset((base, UNKNOWN))
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("fastpeft_requests", "Requests that ended", ["adapter", "status"], **made)
        self.prompt = Counter("fastpeft_prompt_tokens", "Tokens of prompts", ["adapter"], **made)
        self.generated = Counter("fastpeft_generated_tokens", "Tokens generated", ["adapter"], **made)
        self.latency = Histogram("fastpeft_request_seconds", "From request to last token", buckets=_SECONDS, **made)
        self.first = Histogram(
            "fastpeft_time_to_first_token_seconds", "From request to first token", buckets=_SECONDS, **made
        )
        bank = batcher.bank
        for name, what, value in (
            ("queue_length", "Requests that wait for a row", lambda: batcher.waiting),
            ("running_rows", "Requests in the batch", lambda: batcher.running),
            ("cache_tokens", "Tokens that the cache holds", lambda: batcher.max_cached),
            ("captures_steps", "Whether decode steps are CUDA graphs", lambda: "CUDA graphs" in batcher.explain()),
            ("slots", "Adapters that the device has room for", lambda: bank.slots),
            ("resident_adapters", "Adapters in slots on the device", lambda: len(bank.resident())),
            ("known_adapters", "Adapters loaded", lambda: len(bank.names())),
        ):
            Gauge(f"fastpeft_{name}", what, **made).set_function(value)

    def label(self, adapter: str) -> str:
        """The adapter's name, or "unloaded" for one that is no more: names that come and go leave nothing behind."""
        return adapter if adapter in self._constant or adapter in self._bank else "unloaded"

    def forget(self, adapter: str) -> None:
        """Drop what was counted of an adapter that was unloaded."""
        for counter in (self.requests, self.prompt, self.generated):
            counter.remove_by_labels({"adapter": adapter})

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class Measured:
    """One request: begins when made, is counted once by ``end``."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._start = metrics, time.perf_counter()
        self.adapter, self._tokens, self._ended = UNKNOWN, 0, False

    def prompt(self, tokens: int) -> None:
        self._metrics.prompt.labels(self._label()).inc(tokens)

    def token(self) -> None:
        if not self._tokens:
            self._metrics.first.observe(time.perf_counter() - self._start)
        self._tokens += 1
        self._metrics.generated.labels(self._label()).inc()

    def _label(self) -> str:
        return self._metrics.label(self.adapter)

    def end(self, status: int) -> None:
        if self._ended:
            return
        self._ended = True
        self._metrics.requests.labels(self._label(), str(status)).inc()
        if self._tokens:
            self._metrics.latency.observe(time.perf_counter() - self._start)
