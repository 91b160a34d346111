"""The logs of jobs; whether the caller may see or change a job's is checked with the job."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from core.db.models import JobLog


class LogRepository:
    """The log of one job.

    Args:
        session: Where.
        job_id: Whose.
    """

    def __init__(self, session: Session, job_id: str) -> None:
        self._session = session
        self._job_id = job_id

    def end(self) -> int:
        """Return how many bytes were ever written to the log."""
        newest = select(func.max(JobLog.end_byte)).where(JobLog.job_id == self._job_id)
        return self._session.scalar(newest) or 0

    def add(self, chunks: Sequence[JobLog]) -> None:
        """Insert chunks."""
        self._session.add_all(chunks)
        self._session.flush()

    def forget(self, up_to_byte: int) -> None:
        """Delete the chunks that end at a byte or before it."""
        self._session.execute(
            delete(JobLog)
            .where(JobLog.job_id == self._job_id, JobLog.end_byte <= up_to_byte)
            .execution_options(synchronize_session=False)
        )

    def oldest(self) -> JobLog | None:
        """Return the first chunk that is kept."""
        query = self._of(None).order_by(JobLog.end_byte).limit(1)
        return self._session.scalars(query).one_or_none()

    def list_after(self, byte: int, *, attempt: int | None, limit: int) -> Sequence[JobLog]:
        """Return chunks that end behind a byte, the oldest first."""
        query = self._of(attempt).where(JobLog.end_byte > byte)
        return self._session.scalars(query.order_by(JobLog.end_byte).limit(limit)).all()

    def list_before(self, byte: int | None, *, attempt: int | None, limit: int) -> Sequence[JobLog]:
        """Return chunks that end before a byte, or the last ones, the newest first."""
        query = self._of(attempt)
        if byte is not None:
            query = query.where(JobLog.end_byte < byte)
        return self._session.scalars(query.order_by(JobLog.end_byte.desc()).limit(limit)).all()

    def _of(self, attempt: int | None) -> Select[JobLog]:
        query = select(JobLog).where(JobLog.job_id == self._job_id)
        return query if attempt is None else query.where(JobLog.attempt == attempt)
