"""Dry runs: jobs that end with the report of their validation and that no list shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, Job
from core.db.repositories.dialect import is_key
from core.errors import NotFound
from core.principal import Principal

# Versions that are looked through for measurements.
_HISTORY = 200


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
    """How fast a job was; operations as `core.costs` counts them.

    Attributes:
        base_digest: Of the base model it was trained on.
        device: What trained it, such as `cuda`.
        training_seconds: In its optimizer steps.
        training_operations: In these.
        other_seconds: With loading, evaluation and packaging.
        evaluation_operations: In these.
    """

    base_digest: str
    device: str
    training_seconds: float
    training_operations: float
    other_seconds: float
    evaluation_operations: float


def list_trained(session: Session, device: str) -> Sequence[TrainedJob]:
    """Return the last trainings on a kind of device, of whichever project, the newest first.

    Args:
        session: Where.
        device: Such as `cuda`.
    """
    rows = session.execute(
        select(AdapterVersion.base_digest, AdapterVersion.provenance)
        .where(AdapterVersion.job_id.is_not(None))
        .order_by(AdapterVersion.id.desc())
        .limit(_HISTORY)
    )
    found = []
    for base_digest, provenance in rows:
        pace = provenance.get("pace")
        trained_on = str(provenance.get("device", "")).split(":")[0]
        if trained_on == device and pace and pace["training_seconds"] > 0:
            found.append(TrainedJob(base_digest, trained_on, **pace))
    return found
