"""Data sets of one project, and who still refers to their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from core.db.models import Dataset, Export, Job, JobCheckpoint, JobSource
from core.db.repositories.dialect import is_key
from core.errors import NotFound
from core.job_status import UNFINISHED
from core.principal import Principal


class DatasetRepository:
    """Data sets of one project."""

    def __init__(self, session: Session, principal: Principal) -> None:
        self._session = session
        self._principal = principal

    def get(self, dataset_id: str, *, lock: bool = False) -> Dataset:
        """Return a data set.

        Args:
            lock: Let nobody else delete or use it until the transaction ends.

        Raises:
            NotFound: Code `unknown_dataset`.
        """
        dataset = self.find(dataset_id, lock=lock)
        if dataset is None:
            raise NotFound(f"no data set {dataset_id!r}", code="unknown_dataset")
        return dataset

    def find(self, dataset_id: str, *, lock: bool = False, keep: bool = False) -> Dataset | None:
        """Return a data set of the project.

        Args:
            lock: Let nobody else delete or use it until the transaction ends.
            keep: Let nobody delete it until the transaction ends.
        """
        if not is_key(dataset_id):
            return None
        query = select(Dataset).where(
            Dataset.id == dataset_id, Dataset.project_id == self._principal.project_id
        )
        if lock or keep:
            query = query.with_for_update(read=not lock)
        return self._session.scalars(query).one_or_none()

    def add(self, dataset: Dataset) -> None:
        """Insert a data set."""
        self._session.add(dataset)
        self._session.flush()

    def delete(self, dataset: Dataset) -> None:
        """Remove a data set's row."""
        self._session.execute(delete(Dataset).where(Dataset.id == dataset.id))

    def is_needed(self, dataset_id: str) -> bool:
        """Tell whether a waiting or running job needs the data set."""
        alone = exists().where(Job.dataset_id == dataset_id, Job.status.in_(UNFINISHED))
        beside = exists().where(
            JobSource.dataset_id == dataset_id,
            Job.id == JobSource.job_id,
            Job.status.in_(UNFINISHED),
        )
        return any(self._session.scalar(select(used)) for used in (alone, beside))

    def list(self, *, before: str | None, limit: int) -> Sequence[Dataset]:
        """Return data sets older than the id `before`, newest first."""
        query = select(Dataset).where(Dataset.project_id == self._principal.project_id)
        if before is not None:
            query = query.where(Dataset.id < before)
        return self._session.scalars(query.order_by(Dataset.id.desc()).limit(limit)).all()


def find_by_id(session: Session, dataset_id: str) -> Dataset | None:
    """Return a data set of any project, for a worker that holds a job of that project."""
    return session.get(Dataset, dataset_id)


def is_referenced(session: Session, sha256: str) -> bool:
    """Tell whether a data set, a checkpoint or an export of any project has these bytes."""
    return any(
        session.scalar(select(exists().where(table.sha256 == sha256)))
        for table in (Dataset, JobCheckpoint, Export)
    )
