"""Watches jobs and workers in the database, and how long recovery from each fault takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from core.db.models import Adapter, AdapterVersion, Job, Worker
from core.db.session import Database
from core.job_status import TERMINAL
from tests.chaos.schedule import Injection

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 90.0


@dataclass(frozen=True)
class JobState:
    """Where a job is."""

    status: str
    attempt: int
    step: int
    worker_id: str | None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in TERMINAL

    def moved_on(self, before: JobState) -> bool:
        """Tell whether the job has come further: another step, another attempt, or its end."""
        return self.ended or self.attempt > before.attempt or self.step > before.step

    def caught_up(self, before: JobState) -> bool:
        """Tell whether another attempt is as far as the lost one was, or the job has ended."""
        trains = before.status == "running"
        behind = self.step < max(before.step, trains) or self.attempt == before.attempt
        return self.ended or not behind


@dataclass
class Recovery:
    """What must hold again after a fault, and when it did.

    Attributes:
        injection: The fault.
        job_id: The job that was hit, if any.
        before: Where that job was.
        lost: Whether the attempt is lost, so that another one has to catch up.
        worker_pid: A worker that must have reported itself.
        ready: What else must be true.
        seconds: From the fault until all of it held; `None` before that.
    """

    injection: Injection
    job_id: str | None = None
    before: JobState | None = None
    lost: bool = False
    worker_pid: int | None = None
    ready: Sequence[Callable[[], bool]] = ()
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None


class Watch:
    """Polls the database from a thread; a database that is away is no news.

    Args:
        database: Of the cluster.
    """

    def __init__(self, database: Database) -> None:
        self.recovered: list[Recovery] = []
        self.stuck: list[Recovery] = []
        self._database = database
        self._jobs: dict[str, JobState] = {}
        self._worker_pids: set[int] = set()
        self._pending: list[Recovery] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_polling, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._stopping.set()
        self._thread.join()

    @property
    def jobs(self) -> dict[str, JobState]:
        """All jobs as last seen."""
        with self._lock:
            return dict(self._jobs)

    @property
    def pending(self) -> int:
        """How many faults are not recovered from."""
        with self._lock:
            return len(self._pending)

    def unfinished(self) -> list[str]:
        """Return the jobs that have not ended, oldest first."""
        return sorted(job_id for job_id, job in self.jobs.items() if not job.ended)

    def job_of(self, worker_pid: int) -> str | None:
        """Return the job that a worker holds."""
        for job_id, job in self.jobs.items():
            if job.worker_id and not job.ended and f":{worker_pid}:" in job.worker_id:
                return job_id
        return None

    def expect(self, recovery: Recovery) -> None:
        """Wait for a recovery."""
        with self._lock:
            self._pending.append(recovery)

    def refresh(self) -> bool:
        """Look now; tell whether the database could be read."""
        try:
            with self._database.session() as session:
                columns = (Job.id, Job.status, Job.attempt, Job.step, Job.worker_id)
                jobs = {row[0]: JobState(*row[1:]) for row in session.execute(select(*columns))}
                pids = set(session.scalars(select(Worker.pid)))
        except SQLAlchemyError:
            return False
        with self._lock:
            self._jobs, self._worker_pids = jobs, pids
        return True

    def newest_version(self) -> tuple[str, str]:
        """Return reference and digest of what was published last."""
        query = (
            select(Adapter.name, AdapterVersion.version, AdapterVersion.digest)
            .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
            .order_by(AdapterVersion.id.desc())
            .limit(1)
        )
        with self._database.session() as session:
            name, version, digest = session.execute(query).one().tuple()
        return f"{name}@{version}", digest

    def _keep_polling(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            if self.refresh():
                self._check_pending()

    def _check_pending(self) -> None:
        with self._lock:
            pending = list(self._pending)
        for recovery in pending:
            seconds = time.monotonic() - recovery.started
            if self._holds(recovery):
                recovery.seconds = seconds
                self.recovered.append(recovery)
            elif seconds > _PATIENCE_SECONDS:
                self.stuck.append(recovery)
            else:
                continue
            with self._lock:
                self._pending.remove(recovery)

    def _holds(self, recovery: Recovery) -> bool:
        if recovery.worker_pid is not None and recovery.worker_pid not in self._worker_pids:
            return False
        if recovery.job_id is not None and recovery.before is not None:
            job = self._jobs.get(recovery.job_id)
            if job is None:
                return False
            if not (job.caught_up if recovery.lost else job.moved_on)(recovery.before):
                return False
        return all(ready() for ready in recovery.ready)
