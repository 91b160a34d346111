"""Checkpoints of jobs; whether the caller may see or change a job's is checked with the job."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.orm import Session

from core.db.models import JobCheckpoint


class CheckpointRepository:
    """The checkpoints of one job.

    Args:
        session: Where.
        job_id: Whose.
    """

    def __init__(self, session: Session, job_id: str) -> None:
        self._session = session
        self._job_id = job_id

    def add(self, checkpoint: JobCheckpoint) -> None:
        """Insert a checkpoint."""
        self._session.add(checkpoint)
        self._session.flush()

    def list(self) -> Sequence[JobCheckpoint]:
        """Return all checkpoints, the newest first."""
        return self._session.scalars(
            select(JobCheckpoint)
            .where(JobCheckpoint.job_id == self._job_id)
            .order_by(JobCheckpoint.step.desc(), JobCheckpoint.attempt.desc())
        ).all()

    def reject(self, step: int, attempt: int, reason: str) -> None:
        """Note why a checkpoint cannot be used."""
        self._session.execute(
            update(JobCheckpoint)
            .where(
                JobCheckpoint.job_id == self._job_id,
                JobCheckpoint.step == step,
                JobCheckpoint.attempt == attempt,
            )
            .values(invalid_reason=reason)
        )

    def remove(self, checkpoints: Sequence[JobCheckpoint]) -> None:
        """Delete rows; the bytes are the caller's business."""
        keys = [(row.step, row.attempt) for row in checkpoints]
        if keys:
            self._session.execute(
                delete(JobCheckpoint)
                .where(
                    JobCheckpoint.job_id == self._job_id,
                    tuple_(JobCheckpoint.step, JobCheckpoint.attempt).in_(keys),
                )
                .execution_options(synchronize_session=False)
            )
