"""Prometheus metrics of the API: what this service counts, and what it reads when it is scraped.

With several API processes the counters live in files that all of them write (see `server.run`), so
that any process answers for all. Jobs and tokens trained are read from the database, engine numbers
from the engine: they need no counters of their own and survive restarts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import ValueClass

from core.inference.engine import EngineStatus

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_registry = CollectorRegistry()
_requests = Counter(
    "tunesmith_http_requests",
    "HTTP requests by route template, method and status.",
    ["route", "method", "status"],
    registry=_registry,
)
_request_seconds = Histogram(
    "tunesmith_http_request_duration_seconds",
    "Time from a request's start to the end of its answer.",
    ["route", "method"],
    buckets=_LATENCY_BUCKETS,
    registry=_registry,
)
_prompt_tokens = Counter(
    "tunesmith_prompt_tokens", "Prompt tokens of answered requests.", registry=_registry
)
_generated_tokens = Counter(
    "tunesmith_generated_tokens", "Tokens generated in answers.", registry=_registry
)


@dataclass(frozen=True)
class Snapshot:
    """Numbers read at scrape time.

    Attributes:
        jobs_by_status: Jobs of all projects; `None` when the database could not be read.
        trained_tokens: Tokens of all jobs on which a loss was computed.
        engine: `None` when the engine did not answer.
    """

    jobs_by_status: Mapping[str, int] | None = field(default_factory=dict)
    trained_tokens: int = 0
    engine: EngineStatus | None = None


def observe_request(route: str, method: str, status: int, seconds: float) -> None:
    """Count one request; `route` is a template, never a path with values in it."""
    method = method if method in _METHODS else "other"
    _requests.labels(route, method, str(status or 499)).inc()
    _request_seconds.labels(route, method).observe(seconds)


def count_prompt_tokens(tokens: int) -> None:
    """Count the prompt of a request that an engine has accepted."""
    _prompt_tokens.inc(tokens)


def count_generated_tokens(tokens: int) -> None:
    """Count the tokens of an answer."""
    _generated_tokens.inc(tokens)


def render(snapshot: Snapshot) -> bytes:
    """Return everything in Prometheus' text format."""
    counted = _registry
    if getattr(ValueClass, "_multiprocess", False):
        counted = CollectorRegistry()
        MultiProcessCollector(counted)  # type: ignore[no-untyped-call]
    scraped = CollectorRegistry()
    scraped.register(_SnapshotCollector(snapshot))
    return generate_latest(counted) + generate_latest(scraped)


class _SnapshotCollector:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot
        up = snapshot.jobs_by_status is not None
        yield GaugeMetricFamily(
            "tunesmith_database_up", "Whether the database could be read.", value=float(up)
        )
        if snapshot.jobs_by_status is not None:
            jobs = GaugeMetricFamily("tunesmith_jobs", "Jobs by status.", labels=["status"])
            for status, count in sorted(snapshot.jobs_by_status.items()):
                jobs.add_metric([status], count)
            yield jobs
            yield GaugeMetricFamily(
                "tunesmith_trained_tokens",
                "Tokens on which the loss of present jobs was computed.",
                value=snapshot.trained_tokens,
            )
        yield GaugeMetricFamily(
            "tunesmith_engine_up",
            "Whether the engine answered within the scrape.",
            value=float(snapshot.engine is not None),
        )
        if snapshot.engine is not None:
            yield from _engine_metrics(snapshot.engine)


def _engine_metrics(status: EngineStatus) -> Iterable[Metric]:
    gauges = {
        "tunesmith_engine_ready": ("Whether the engine accepts requests.", float(status.ready)),
        "tunesmith_engine_resident_adapters": ("Adapters in memory.", len(status.adapters)),
        "tunesmith_engine_resident_bytes": ("Bytes of adapters in memory.", status.resident_bytes),
        "tunesmith_engine_running_requests": ("Requests being answered.", status.running),
        "tunesmith_engine_waiting_requests": ("Requests that wait for a place.", status.waiting),
    }
    counters = {
        "tunesmith_engine_adapter_loads": ("Adapters loaded.", status.loads),
        "tunesmith_engine_adapter_evictions": ("Adapters evicted.", status.evictions),
        "tunesmith_engine_adapter_load_failures": ("Loads refused.", status.load_failures),
        "tunesmith_engine_prompt_tokens": ("Prompt tokens computed.", status.prompt_tokens),
        "tunesmith_engine_completion_tokens": ("Tokens generated.", status.completion_tokens),
    }
    for name, (description, value) in gauges.items():
        yield GaugeMetricFamily(name, description, value=value)
    for name, (description, value) in counters.items():
        yield CounterMetricFamily(name, description, value=value)
