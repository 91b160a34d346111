"""Jobs as workers see them: claims, fenced writes and what dead workers left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.capabilities import Capabilities
from core.db.models import Job, Project, utc_now
from core.db.repositories.dialect import can_lock_rows, take_turn
from core.db.repositories.history import Event, advance
from core.db.repositories.queue import (
    CLAIMED_AT,
    HELD_STATUS,
    WAITING_STATUS,
    Stage,
    best_waiting,
)
from core.db.types import database_epoch
from core.errors import LeaseLost

_STARTED_EVENT = {"validate": "validation_started", "train": "training_started"}


class ClaimRepository:
    """Jobs of all projects, written by one worker."""

    def __init__(self, session: Session, worker_id: str) -> None:
        self._session = session
        self._worker_id = worker_id

    def claim(
        self, stage: Stage, lease_seconds: float, worker: Capabilities, running_quota: int
    ) -> Job | None:
        """Take the best waiting job that the worker can run; see `queue.best_waiting`.

        One statement decides. Claims of a stage come one after the other, on SQLite because the
        session must be open for writing, so that quotas and turns are exact.

        Args:
            stage: What the worker does.
            lease_seconds: How long the first lease lasts.
            worker: What it has.
            running_quota: For projects without one of their own; 0 is no limit.
        """
        take_turn(self._session, f"claim:{stage}")
        values: dict[str, Any] = {}
        if stage == "train":
            values["started_at"] = func.coalesce(Job.started_at, utc_now())
            values["attempt_started_epoch"] = database_epoch()
        job = advance(
            self._session,
            Job.id == best_waiting(stage, worker, running_quota).scalar_subquery(),
            # Again, for its owner may change it while the statement waits for him.
            Job.status == WAITING_STATUS[stage],
            Job.worker_id.is_(None),
            events=[(_STARTED_EVENT[stage], {})],
            status=HELD_STATUS[stage],
            attempt=Job.attempt + 1,
            worker_id=self._worker_id,
            lease_expires_epoch=database_epoch() + lease_seconds,
            stage=stage,
            step=0,
            total_steps=None,
            eta_seconds=None,
            trained_tokens=0,
            **values,
        )
        if job is not None:
            self._session.execute(
                update(Project)
                .where(Project.id == job.project_id)
                .values({CLAIMED_AT[stage]: database_epoch()})
                .execution_options(synchronize_session=False)
            )
        return job

    def is_waiting(self, stage: Stage, worker: Capabilities, running_quota: int) -> bool:
        """Tell whether a job waits that the worker can run, be it locked at this moment or not."""
        if not can_lock_rows(self._session):
            return False  # nothing is locked, so a claim that found nothing is right
        query = best_waiting(stage, worker, running_quota, lock=False)
        return self._session.scalar(query) is not None

    def write(
        self,
        job_id: str,
        attempt: int,
        stage: Stage,
        events: Sequence[Event] = (),
        /,
        **values: Any,
    ) -> Job:
        """Change a job that this worker holds.

        Raises:
            LeaseLost: It holds that attempt no longer; nothing was changed.
        """
        job = advance(
            self._session,
            Job.id == job_id,
            Job.attempt == attempt,
            Job.worker_id == self._worker_id,
            Job.status == HELD_STATUS[stage],
            events=events,
            **values,
        )
        if job is None:
            raise LeaseLost(
                f"attempt {attempt} of {job_id} is no longer held by {self._worker_id}",
                hint="Stop working on it; another worker may have it.",
            )
        return job

    def renew(
        self,
        job_id: str,
        attempt: int,
        stage: Stage,
        lease_seconds: float,
        events: Sequence[Event] = (),
        /,
        **values: Any,
    ) -> Job:
        """Extend the lease by the database's clock, and change the job as `write` does.

        Raises:
            LeaseLost: The worker holds that attempt no longer.
        """
        expires = database_epoch() + lease_seconds
        return self.write(job_id, attempt, stage, events, lease_expires_epoch=expires, **values)

    def hand_back(
        self, job_id: str, attempt: int, stage: Stage, status: str, event: Event, **values: Any
    ) -> Job:
        """Let go of a job that waits again as `status`, or stops if its owner asked for that.

        Raises:
            LeaseLost: The worker holds that attempt no longer.
        """
        job = self.write(
            job_id, attempt, stage, [event], status=status, stage=None, **self._let_go(), **values
        )
        return self._stop_if_requested(job)

    def end(
        self, job_id: str, attempt: int, stage: Stage, status: str, event: Event, **values: Any
    ) -> Job:
        """Let go of a job that has ended as `status`.

        Raises:
            LeaseLost: The worker holds that attempt no longer.
        """
        return self.write(
            job_id,
            attempt,
            stage,
            [event],
            status=status,
            finished_at=utc_now(),
            stop_requested=None,
            **self._let_go(),
            **values,
        )

    def list_expired(self, limit: int) -> Sequence[Job]:
        """Return jobs whose lease has run out, locked where the database can."""
        return self._session.scalars(
            select(Job)
            .where(Job.worker_id.is_not(None), Job.lease_expires_epoch < database_epoch())
            .order_by(Job.lease_expires_epoch)
            .limit(limit)
            .with_for_update(skip_locked=True)
        ).all()

    def list_held(self) -> set[tuple[str, int]]:
        """Return (job id, attempt) of all jobs that some worker holds."""
        rows = self._session.execute(select(Job.id, Job.attempt).where(Job.worker_id.is_not(None)))
        return {(row[0], row[1]) for row in rows}

    def requeue_lost(self, job: Job, event: Event, **values: Any) -> None:
        """Let a job wait again whose worker vanished, or stop it if that was asked."""
        changed = advance(
            self._session,
            Job.id == job.id,
            Job.attempt == job.attempt,
            Job.status == job.status,
            events=[event],
            status="queued" if job.status == "running" else job.status,
            stage=None,
            **self._let_go(),
            **values,
        )
        if changed is not None:
            self._stop_if_requested(changed)

    def give_up_lost(self, job: Job, error: dict[str, Any]) -> None:
        """Fail a job whose workers vanished too often."""
        advance(
            self._session,
            Job.id == job.id,
            Job.attempt == job.attempt,
            Job.status == job.status,
            events=[("failed", {"error": error})],
            status="failed",
            error=error,
            lost_attempts=Job.lost_attempts + 1,
            finished_at=utc_now(),
            stop_requested=None,
            **self._let_go(),
        )

    def _let_go(self) -> dict[str, Any]:
        """Return the values of a job that nobody holds, with the time of the attempt added up."""
        worked = func.coalesce(database_epoch() - Job.attempt_started_epoch, 0.0)
        return {
            "worker_id": None,
            "lease_expires_epoch": None,
            "eta_seconds": None,
            "attempt_started_epoch": None,
            "used_seconds": Job.used_seconds + worked,
        }

    def _stop_if_requested(self, job: Job) -> Job:
        match job.stop_requested:
            case "cancel":
                values: dict[str, Any] = {"status": "cancelled", "finished_at": utc_now()}
            case "pause":
                values = {"status": "paused"}
            case _:
                return job
        event: Event = (values["status"], {})
        stopped = advance(
            self._session, Job.id == job.id, events=[event], stop_requested=None, **values
        )
        return stopped or job
