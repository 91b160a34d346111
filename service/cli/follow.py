"""Watching a job until it ends: a live bar for a person, plain lines for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from core.errors import TunesmithError, Unavailable
from service.cli.client import ServiceClient
from service.cli.output import is_interactive, note, show_seconds

TERMINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})

_POLL_SECONDS = 0.5
_LINE_SECONDS = 10.0
# A restart of the API takes a few seconds; longer silence means that the service is gone.
_PATIENCE_SECONDS = 30.0


@dataclass
class JobWatch:
    """Reads a job and the measurements that are new since the last look.

    Attributes:
        service: Where the job is.
        job_id: Which one.
        job: The job as last read.
        metric: The newest measurement of a loss; empty before the first.
    """

    service: ServiceClient
    job_id: str
    job: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, Any] = field(default_factory=dict)
    _cursor: str | None = None

    def look(self) -> None:
        """Read the job and its newest measurements.

        Raises:
            TunesmithError: The service refused, or cannot be reached.
        """
        self.job = self.service.call("GET", f"/jobs/{self.job_id}")
        while True:
            cursor = {"cursor": self._cursor} if self._cursor else {}
            page = self.service.call(
                "GET", f"/jobs/{self.job_id}/metrics", params={"limit": 200, **cursor}
            )
            for row in page["data"]:
                if row["loss"] is not None:
                    self.metric = row
            if page["next_cursor"] is None:
                # The last page is read again next time: it may have grown.
                return
            self._cursor = page["next_cursor"]

    def until_ended(self) -> Iterator[None]:
        """Look again and again; yields after each look, the last one after the job has ended.

        Raises:
            TunesmithError: The service refused, or was gone for long.
        """
        answered = time.monotonic()
        while True:
            try:
                self.look()
                answered = time.monotonic()
            except Unavailable:
                if time.monotonic() - answered > _PATIENCE_SECONDS:
                    raise
            if self.job:
                yield
                if self.job["status"] in TERMINAL_STATUSES:
                    return
            time.sleep(_POLL_SECONDS)


def follow_job(service: ServiceClient, job_id: str, *, live: bool = True) -> dict[str, Any]:
    """Show a job's progress on stderr until it ends, and return it.

    Args:
        service: Where the job is.
        job_id: Which one.
        live: Draw a moving bar where stderr is a terminal.
    """
    watch = JobWatch(service, job_id)
    display: _Bar | _Lines = _Bar() if live and is_interactive() else _Lines()
    with display:
        for _ in watch.until_ended():
            display.show(watch)
    return watch.job


def check_succeeded(job: dict[str, Any]) -> None:
    """Raise the error of a job that ended otherwise than in success.

    Raises:
        TunesmithError: As the job tells it.
    """
    if job["status"] == "succeeded":
        return
    error = job["error"] or {}
    raise TunesmithError(
        f"{job['id']} {job['status']}: {error.get('message', 'no adapter was made')}",
        code=error.get("code", job["status"]),
        hint=error.get("hint"),
        line=error.get("line"),
        field=error.get("field"),
        errors=error.get("errors"),
    )


def describe_stage(job: dict[str, Any]) -> str:
    """Return what a job does at present, such as `running: train`."""
    progress = job["progress"]
    if job["status"] == "queued" and progress.get("waiting_reason"):
        return f"queued: {progress['waiting_reason']}"
    if job["status"] == "queued" and progress.get("queue_position"):
        return f"queued behind {progress['queue_position']}"
    stage = progress.get("stage")
    running = job["status"] in {"validating", "running"}
    return f"{job['status']}: {stage}" if running and stage else str(job["status"])


def describe_numbers(watch: JobWatch) -> str:
    """Return loss, speed and remaining time as far as they are known."""
    metric, progress = watch.metric, watch.job["progress"]
    parts = []
    if metric.get("loss") is not None:
        parts.append(f"loss {metric['loss']:.3f}")
    if metric.get("tokens_per_second"):
        parts.append(f"{metric['tokens_per_second']:.0f} tok/s")
    if watch.job["status"] == "running" and progress.get("eta_seconds"):
        parts.append(f"{show_seconds(progress['eta_seconds'])} left")
    return "  ".join(parts)


class _Lines(AbstractContextManager["_Lines"]):
    """A line at every change of stage, and now and then while steps go by."""

    def __init__(self) -> None:
        self._stage = ""
        self._shown = (0, 0.0)

    def show(self, watch: JobWatch) -> None:
        """Print a line if there is news worth one."""
        stage, progress = describe_stage(watch.job), watch.job["progress"]
        step, at = self._shown
        now = time.monotonic()
        moved = progress["step"] != step and now - at >= _LINE_SECONDS
        if stage == self._stage and not moved:
            return
        self._stage, self._shown = stage, (progress["step"], now)
        steps = f"  step {progress['step']}/{progress['total_steps']}"
        note(
            f"{stage}{steps if progress['total_steps'] else ''}  {describe_numbers(watch)}".rstrip()
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class _Bar(AbstractContextManager["_Bar"]):
    """A bar that moves in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(file=sys.stderr),
        )
        self._task = self._progress.add_task("waiting", total=None, numbers="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def show(self, watch: JobWatch) -> None:
        """Redraw."""
        progress = watch.job["progress"]
        self._progress.update(
            self._task,
            description=describe_stage(watch.job),
            completed=progress["step"],
            total=progress["total_steps"],
            numbers=describe_numbers(watch),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
