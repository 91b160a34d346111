"""Events and metrics of jobs, and the one statement by which a job moves on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, tuple_, update
from sqlalchemy.orm import Session

from core.db.models import Job, JobEvent, JobMetric
from core.db.repositories import usage
from core.db.repositories.dialect import insert_into
from core.job_status import TERMINAL, sources
from core.webhooks.outbox import tell_of_job

Event = tuple[str, dict[str, Any]]
"""Type and data of an event."""

_MEASURED = (
    "epoch",
    "loss",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "margin",
    "eval_margin",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_bytes",
)


def advance(
    session: Session, *conditions: ColumnElement[bool], events: Sequence[Event] = (), **values: Any
) -> Job | None:
    """Update the one job that meets all conditions and append events to its history.

    The event numbers are taken by the same statement that checks the conditions, so they have no
    gaps and a writer whose conditions no longer hold leaves no trace. A `status` among the values
    is one more condition: that a job may come to it from where it is.

    Returns:
        The job after the update, or `None` when no job met the conditions.
    """
    if "status" in values:
        conditions = (*conditions, Job.status.in_(sources(values["status"])))
    statement = (
        update(Job)
        .where(*conditions)
        .values(last_event=Job.last_event + len(events), **values)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    job = session.scalars(statement).one_or_none()
    if job is not None:
        first = job.last_event - len(events) + 1
        session.add_all(
            JobEvent(job_id=job.id, sequence=first + i, attempt=job.attempt, type=kind, data=data)
            for i, (kind, data) in enumerate(events)
        )
        session.flush()
        if job.dry_run:
            # Nobody hears of it, and it has used nothing.
            return job
        if "status" in values:
            tell_of_job(session, job)
        if values.get("status") in TERMINAL:
            usage.count_end(session, job)
    return job


class HistoryRepository:
    """Reads and writes events and metrics; whether the caller may is checked with the job."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list_events(self, job_id: str, *, after: int, limit: int) -> Sequence[JobEvent]:
        """Return events with a sequence above `after`, oldest first."""
        return self._session.scalars(
            select(JobEvent)
            .where(JobEvent.job_id == job_id, JobEvent.sequence > after)
            .order_by(JobEvent.sequence)
            .limit(limit)
        ).all()

    def list_metrics(
        self, job_id: str, *, after: tuple[int, int], attempt: int | None, limit: int
    ) -> Sequence[JobMetric]:
        """Return metrics behind the position (attempt, step), in that order."""
        query = select(JobMetric).where(
            JobMetric.job_id == job_id, tuple_(JobMetric.attempt, JobMetric.step) > after
        )
        if attempt is not None:
            query = query.where(JobMetric.attempt == attempt)
        return self._session.scalars(
            query.order_by(JobMetric.attempt, JobMetric.step).limit(limit)
        ).all()

    def drop_metrics(self, job_id: str, *, after_step: int, before_attempt: int) -> None:
        """Remove what earlier attempts measured at steps that a later one does again."""
        self._session.execute(
            delete(JobMetric)
            .where(
                JobMetric.job_id == job_id,
                JobMetric.attempt < before_attempt,
                JobMetric.step > after_step,
            )
            .execution_options(synchronize_session=False)
        )

    def merge_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Insert metrics; a row that exists keeps the measurements that are `None` in the new one.

        Args:
            rows: Column values, at most one mapping per (job_id, attempt, step).
        """
        if not rows:
            return
        statement = insert_into(self._session, JobMetric)
        statement = statement.on_conflict_do_update(
            index_elements=["job_id", "attempt", "step"],
            set_={
                name: func.coalesce(statement.excluded[name], getattr(JobMetric, name))
                for name in _MEASURED
            },
        )
        self._session.execute(statement, list(rows))
