"""What a server tells Prometheus."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gradsafe.serving.access import App, Receive, Scope, Send
from gradsafe.serving.batching import Batcher
from gradsafe.serving.config import ROUTES
from gradsafe.serving.guard import DriftMonitor

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CLIENT_CLOSED = 499  # status of a request whose client closed the connection, as in nginx


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "gradsafe_requests", "Requests.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "gradsafe_request_seconds", "Time of a request.", ("route",), registry=registry
        )
        self.batches = Histogram(
            "gradsafe_batch_prompts", "Prompts of a batch.", buckets=SIZES, registry=registry
        )
        self.prompts = Counter(
            "gradsafe_prompts",
            "Passed, flagged, failed.",
            ("outcome",),
            registry=registry,
        )

    def watch(self, batcher: Batcher, drift: DriftMonitor) -> None:
        """Adds the values that are read when they are asked for."""
        gauges = {
            "queue_prompts": ("Encoded prompts that wait for a batch.", lambda: batcher.waiting),
            "accepted_prompts": ("Prompts without an answer.", lambda: batcher.accepted),
            "score_drift_psi": (
                "Population stability index of the latest scores against those of the calibration.",
                drift.index,
            ),
            "score_drift_scores": ("Scores that the index is computed from.", lambda: len(drift)),
        }
        for name, (text, read) in gauges.items():
            Gauge(f"gradsafe_{name}", text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All values in Prometheus's format."""
        return generate_latest(self.registry)


class Measured:
    """Middleware that counts the requests of an app by route and status, and takes their time."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_CLOSED

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        route = scope["path"] if scope["path"] in ROUTES else "other"
        try:
            await self.app(scope, receive, note)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
