"""Prometheus metrics of the API: what this service counts, and what it reads when it is scraped.

With several API processes the counters live in files that all of them write (see `server.run`), so
that any process answers for all. Jobs, tokens, workers and webhooks are read from the database,
engine numbers from the engine: they need no counters of their own and survive restarts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import ValueClass

from core.db.repositories.overview import Totals
from core.inference.engine import EngineStatus
from core.job_status import TERMINAL
from core.queue import QUEUES

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
        totals: `None` when the database could not be read.
        engine: `None` when the engine did not answer.
    """

    totals: Totals | None = None
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
        yield GaugeMetricFamily(
            "tunesmith_database_up",
            "Whether the database could be read.",
            value=float(snapshot.totals is not None),
        )
        if snapshot.totals is not None:
            yield from _job_metrics(snapshot.totals)
            yield from _delivery_metrics(snapshot.totals)
        yield GaugeMetricFamily(
            "tunesmith_engine_up",
            "Whether the engine answered within the scrape.",
            value=float(snapshot.engine is not None),
        )
        if snapshot.engine is not None:
            yield from _engine_metrics(snapshot.engine)


def _job_metrics(totals: Totals) -> Iterable[Metric]:
    jobs = GaugeMetricFamily(
        "tunesmith_jobs", "Jobs that have not ended, by status.", labels=["status"]
    )
    ages = GaugeMetricFamily(
        "tunesmith_oldest_job_age_seconds",
        "Time since the oldest job of a status was submitted.",
        labels=["status"],
    )
    for status, count in totals.unfinished.items():
        jobs.add_metric([status], count)
        oldest = totals.oldest.get(status)
        ages.add_metric([status], max(0.0, time.time() - oldest.timestamp()) if oldest else 0.0)
    ended = CounterMetricFamily(
        "tunesmith_jobs_ended",
        "Ends of jobs, by how; a job that is tried again ends again.",
        labels=["status"],
    )
    for status in TERMINAL:
        ended.add_metric([status], totals.ended.get(status, 0))
    workers = GaugeMetricFamily(
        "tunesmith_workers", "Workers that have reported lately, by queue.", labels=["queue"]
    )
    for queue in QUEUES:
        workers.add_metric([queue], totals.workers.get(queue, 0))
    yield from (jobs, ages, ended, workers)
    yield GaugeMetricFamily(
        "tunesmith_expired_leases",
        "Jobs whose worker has fallen silent and that the sweep has yet to find.",
        value=totals.expired_leases,
    )
    yield GaugeMetricFamily(
        "tunesmith_trained_tokens",
        "Tokens on which the loss of ended and running jobs was computed.",
        value=totals.trained_tokens,
    )
    yield GaugeMetricFamily(
        "tunesmith_job_work_seconds",
        "Time that workers have spent on training the jobs that have ended.",
        value=totals.used_seconds,
    )


def _delivery_metrics(totals: Totals) -> Iterable[Metric]:
    deliveries = GaugeMetricFamily(
        "tunesmith_webhook_deliveries",
        "Webhook messages that are not delivered: pending, or dead after the last attempt.",
        labels=["status"],
    )
    for status, count in totals.deliveries.items():
        deliveries.add_metric([status], count)
    yield deliveries
    yield GaugeMetricFamily(
        "tunesmith_webhook_delay_seconds",
        "For how long the oldest pending webhook message has been due.",
        value=totals.delivery_delay_seconds,
    )


def _engine_metrics(status: EngineStatus) -> Iterable[Metric]:
    gauges = {
        "tunesmith_engine_ready": ("Whether the engine accepts requests.", float(status.ready)),
        "tunesmith_engine_resident_adapters": ("Adapters in memory.", len(status.adapters)),
        "tunesmith_engine_resident_bytes": ("Bytes of adapters in memory.", status.resident_bytes),
        "tunesmith_engine_row_bytes": ("Keys and values of rows at work.", status.row_bytes),
        "tunesmith_engine_prefix_bytes": (
            "Bytes kept of prompts for others that begin alike.",
            status.prefix_bytes,
        ),
        "tunesmith_engine_base_bytes": ("Bytes of base models in memory.", status.base_bytes),
        "tunesmith_engine_running_requests": ("Requests being answered.", status.running),
        "tunesmith_engine_waiting_requests": ("Requests that wait for a place.", status.waiting),
    }
    counters = {
        "tunesmith_engine_adapter_loads": ("Adapters loaded.", status.loads),
        "tunesmith_engine_adapter_evictions": ("Adapters evicted.", status.evictions),
        "tunesmith_engine_adapter_load_failures": ("Loads refused.", status.load_failures),
        "tunesmith_engine_base_loads": ("Base models loaded.", status.base_loads),
        "tunesmith_engine_prompt_tokens": ("Prompt tokens of requests.", status.prompt_tokens),
        "tunesmith_engine_reused_prompt_tokens": (
            "Prompt tokens taken over from a prompt that began alike.",
            status.reused_prompt_tokens,
        ),
        "tunesmith_engine_completion_tokens": ("Tokens generated.", status.completion_tokens),
    }
    for name, (description, value) in gauges.items():
        yield GaugeMetricFamily(name, description, value=value)
    for name, (description, value) in counters.items():
        yield CounterMetricFamily(name, description, value=value)
