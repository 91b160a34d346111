"""Dry runs: jobs that end with the report of their validation and that no list shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, Job, JobMetric
from core.db.repositories.dialect import is_key
from core.errors import NotFound
from core.principal import Principal

# Jobs that succeeded lately, and measurements of each, which a speed is made from.
_HISTORY = 200
_MEASURED_JOBS = 5
_MEASUREMENTS = 200


class DryRunRepository:
    """Dry runs of one project."""

    def __init__(self, session: Session, principal: Principal) -> None:
        self._session = session
        self._principal = principal

    def add(self, job: Job) -> None:
        """Insert a dry run."""
        self._session.add(job)
        self._session.flush()

    def get(self, dry_run_id: str) -> Job:
        """Return a dry run, read afresh.

        Raises:
            NotFound: Code `unknown_validation`.
        """
        job = None
        if is_key(dry_run_id):
            job = self._session.scalars(
                select(Job)
                .where(
                    Job.id == dry_run_id,
                    Job.project_id == self._principal.project_id,
                    Job.dry_run.is_(True),
                )
                .execution_options(populate_existing=True)
            ).one_or_none()
        if job is None:
            raise NotFound(
                f"no validation {dry_run_id!r}",
                code="unknown_validation",
                hint="One is kept for a day; POST /jobs/validate makes another.",
            )
        return job

    def count_unfinished(self) -> int:
        """Count those without a report yet."""
        query = select(func.count()).where(
            Job.project_id == self._principal.project_id,
            Job.dry_run.is_(True),
            Job.finished_at.is_(None),
        )
        return self._session.scalar(query) or 0


@dataclass(frozen=True)
class TrainedJob:
    """How fast a job was.

    Attributes:
        device: What trained it, such as `cuda`.
        tokens_per_second: While it trained.
        tokens: That it read.
        used_seconds: All its work, with loading, evaluation and packaging.
    """

    device: str
    tokens_per_second: float
    tokens: int
    used_seconds: float


def list_trained(session: Session, project_id: str, base_model: str) -> Sequence[TrainedJob]:
    """Return a project's last jobs that succeeded on a base model, the newest first.

    Args:
        session: Where.
        project_id: The project's.
        base_model: What they were trained on.
    """
    recent = (
        select(Job.id, Job.base_model, Job.version_id, Job.trained_tokens, Job.used_seconds)
        .where(Job.project_id == project_id, Job.status == "succeeded", Job.dry_run.is_(False))
        .order_by(Job.id.desc())
        .limit(_HISTORY)
        .subquery()
    )
    rows = session.execute(
        select(recent.c.id, recent.c.trained_tokens, recent.c.used_seconds, AdapterVersion)
        .join(AdapterVersion, AdapterVersion.id == recent.c.version_id)
        .where(recent.c.base_model == base_model)
        .order_by(recent.c.id.desc())
        .limit(_MEASURED_JOBS)
    ).all()
    found = []
    for job_id, tokens, used_seconds, version in rows:
        device = str(version.provenance.get("device", "")).split(":")[0]
        speed = _mean_speed(session, job_id)
        if device and speed:
            found.append(TrainedJob(device, speed, tokens, used_seconds))
    return found


def _mean_speed(session: Session, job_id: str) -> float | None:
    measured = (
        select(JobMetric.tokens_per_second)
        .where(JobMetric.job_id == job_id)
        .order_by(JobMetric.attempt.desc(), JobMetric.step.desc())
        .limit(_MEASUREMENTS)
        .subquery()
    )
    return session.scalar(select(func.avg(measured.c.tokens_per_second)))
