"""What the owner of a job reads: its state, its history, its measurements and its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from core.config import Settings
from core.db.models import Job, JobMetric
from core.db.repositories.checkpoints import CheckpointRepository
from core.db.repositories.history import HistoryRepository
from core.db.repositories.jobs import JobFilter, JobRepository
from core.errors import NotFound
from core.jobs.sources import first_reference
from core.jobs.waiting import Outlook, outlook
from core.principal import Principal
from core.reads import (
    CheckpointRead,
    EventRead,
    JobRead,
    MetricRead,
    Page,
    Progress,
    VersionName,
    decode_cursor,
    encode_cursor,
    invalid_cursor,
)
from core.specs import JobSpec


def get(
    session: Session, principal: Principal, job_id: str, *, settings: Settings | None = None
) -> JobRead:
    """Return a job; while it waits, with its place in the queue and what it waits for.

    Args:
        session: Where.
        principal: The owner.
        job_id: The job.
        settings: With them, the quota of running jobs is among the reasons to wait.

    Raises:
        NotFound: Code `unknown_job`.
    """
    jobs = JobRepository(session, principal)
    job = jobs.get(job_id)
    return to_read(job, jobs.versions([job]), expected=outlook(session, job, settings))


def list_jobs(
    session: Session,
    principal: Principal,
    *,
    status: str | None = None,
    adapter: str | None = None,
    base_model: str | None = None,
    cursor: str | None = None,
    limit: int = 20,
) -> Page[JobRead]:
    """Return a page of jobs, newest first.

    Raises:
        InvalidInput: Code `invalid_cursor`.
    """
    jobs = JobRepository(session, principal)
    before = decode_cursor(cursor) if cursor else None
    chosen = JobFilter(status=status, adapter=adapter, base_model=base_model)
    rows = jobs.list(chosen, before=before, limit=limit + 1)
    shown, more = rows[:limit], len(rows) > limit
    versions = jobs.versions(shown)
    return Page(
        data=[to_read(job, versions) for job in shown],
        next_cursor=encode_cursor(shown[-1].id) if more else None,
    )


def events(
    session: Session, principal: Principal, job_id: str, *, after: int = 0, limit: int = 100
) -> Page[EventRead]:
    """Return a job's events with an id above `after`, oldest first.

    `next_cursor` is the last id as a decimal number, since ids are what clients resume from.

    Raises:
        NotFound: Code `unknown_job`.
    """
    JobRepository(session, principal).get(job_id)
    # A sequence is a 32-bit column: nothing lies behind a larger one.
    after = max(0, min(after, 2**31 - 1))
    rows = HistoryRepository(session).list_events(job_id, after=after, limit=limit + 1)
    shown, more = rows[:limit], len(rows) > limit
    return Page(
        data=[
            EventRead(
                id=row.sequence,
                attempt=row.attempt,
                type=row.type,
                data=row.data,
                created_at=row.created_at,
            )
            for row in shown
        ],
        next_cursor=str(shown[-1].sequence) if more else None,
    )


def metrics(
    session: Session,
    principal: Principal,
    job_id: str,
    *,
    attempt: int | None = None,
    cursor: str | None = None,
    limit: int = 1000,
) -> Page[MetricRead]:
    """Return a page of a job's measurements, by attempt and step.

    Raises:
        NotFound: Code `unknown_job`.
        InvalidInput: Code `invalid_cursor`.
    """
    JobRepository(session, principal).get(job_id)
    after = _metric_position(cursor) if cursor else (0, -1)
    rows = HistoryRepository(session).list_metrics(
        job_id, after=after, attempt=attempt, limit=limit + 1
    )
    shown, more = rows[:limit], len(rows) > limit
    return Page(
        data=[_metric_read(row) for row in shown],
        next_cursor=encode_cursor(f"{shown[-1].attempt}:{shown[-1].step}") if more else None,
    )


def checkpoints(session: Session, principal: Principal, job_id: str) -> Page[CheckpointRead]:
    """Return the checkpoints of a job that are kept, the newest first.

    Raises:
        NotFound: Code `unknown_job`.
    """
    JobRepository(session, principal).get(job_id)
    return Page(
        data=[
            CheckpointRead(
                step=row.step,
                attempt=row.attempt,
                bytes=row.bytes,
                created_at=row.created_at,
                usable=row.invalid_reason is None,
                reason=row.invalid_reason,
            )
            for row in CheckpointRepository(session, job_id).list()
        ]
    )


def report(session: Session, principal: Principal, job_id: str) -> dict[str, Any]:
    """Return a job's before/after report.

    Raises:
        NotFound: Code `unknown_job`, or `no_report` when the job has not produced one.
    """
    job = JobRepository(session, principal).get(job_id)
    if job.report is None:
        raise NotFound(
            f"job {job_id} is {job.status} and has no report",
            code="no_report",
            hint="A report is there once the job has succeeded.",
        )
    return job.report


def to_read(
    job: Job,
    versions: Mapping[str, tuple[str, int, str, str | None]],
    *,
    expected: Outlook = Outlook(),
) -> JobRead:
    """Return what the owner sees of a row.

    Args:
        job: The row.
        versions: From `JobRepository.versions`.
        expected: What it can expect while it waits, if that was asked for.
    """
    spec = JobSpec.model_validate(job.spec)
    published = versions.get(job.version_id) if job.version_id else None
    percent = round(100 * min(job.step / job.total_steps, 1), 1) if job.total_steps else None
    return JobRead(
        id=job.id,
        status=job.status,
        adapter=job.adapter_name,
        base_model=job.base_model,
        dataset=job.dataset_id or first_reference(job),
        spec=spec,
        priority=job.priority,
        attempt=job.attempt,
        stop_requested=job.stop_requested,
        progress=Progress(
            stage=job.stage,
            step=job.step,
            total_steps=job.total_steps,
            percent=percent,
            eta_seconds=expected.eta_seconds if job.eta_seconds is None else job.eta_seconds,
            queue_position=expected.queue_position,
            starts_in_seconds=expected.starts_in_seconds,
            waiting_reason=expected.waiting_reason,
            trained_tokens=job.trained_tokens,
        ),
        error=job.error,
        version=VersionName(
            name=published[0],
            version=published[1],
            digest=published[2],
            quarantine=published[3],
        )
        if published
        else None,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        metadata=spec.metadata,
    )


def _metric_read(row: JobMetric) -> MetricRead:
    return MetricRead(**{name: getattr(row, name) for name in MetricRead.model_fields})


def _metric_position(cursor: str) -> tuple[int, int]:
    attempt, _, step = decode_cursor(cursor).partition(":")
    if not (attempt.isdecimal() and step.isdecimal() and len(attempt + step) < 18):
        raise invalid_cursor()
    return int(attempt), int(step)
