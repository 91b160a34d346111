"""The data sets of jobs that use several, one for validation, or one of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.db.models import JobSource


def add_sources(session: Session, sources: Sequence[JobSource]) -> None:
    """Insert the sources of a job, which exists already."""
    session.add_all(sources)
    session.flush()


def list_sources(session: Session, job_id: str) -> Sequence[JobSource]:
    """Return the sources of a job in order; none for one that has a single data set."""
    query = select(JobSource).where(JobSource.job_id == job_id).order_by(JobSource.position)
    return session.scalars(query).all()


def set_fetched(session: Session, job_id: str, position: int, dataset_id: str) -> None:
    """Tell which data set the rows of a source have become."""
    session.execute(
        update(JobSource)
        .where(JobSource.job_id == job_id, JobSource.position == position)
        .values(dataset_id=dataset_id)
        .execution_options(synchronize_session=False)
    )
