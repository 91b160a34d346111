"""Jobs as their owners see them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.db.models import Adapter, AdapterVersion, IdempotencyKey, Job
from core.db.repositories.dialect import is_key
from core.errors import NotFound
from core.job_status import TERMINAL
from core.principal import Principal


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list holds; `None` does not filter."""

    status: str | None = None
    adapter: str | None = None
    base_model: str | None = None


class JobRepository:
    """Jobs of one project; a dry run is none."""

    def __init__(self, session: Session, principal: Principal) -> None:
        self._session = session
        self._principal = principal

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFound: Code `unknown_job`.
        """
        job = self.find(job_id)
        if job is None:
            raise NotFound(f"no job {job_id!r}", code="unknown_job")
        return job

    def find(self, job_id: str) -> Job | None:
        """Return a job of the project, read afresh."""
        if not is_key(job_id):
            return None
        return self._session.scalars(
            select(Job)
            .where(Job.id == job_id, self._owned())
            .execution_options(populate_existing=True)
        ).one_or_none()

    def add(self, job: Job) -> None:
        """Insert a job."""
        self._session.add(job)
        self._session.flush()

    def add_under_key(self, job: Job, key: IdempotencyKey) -> bool:
        """Insert a job together with its idempotency key.

        Returns:
            False when the key was taken meanwhile; then nothing is inserted.
        """
        try:
            with self._session.begin_nested():
                self._session.add(job)
                self._session.flush()
                self._session.add(key)
        except IntegrityError:
            if self.find_key(key.key) is None:
                raise
            return False
        return True

    def find_key(self, key: str) -> IdempotencyKey | None:
        """Return what the project used an idempotency key for."""
        return self._session.scalars(
            select(IdempotencyKey).where(
                IdempotencyKey.project_id == self._principal.project_id, IdempotencyKey.key == key
            )
        ).one_or_none()

    def delete(self, job_id: str) -> bool:
        """Remove an ended job with its history, log and keys; False when it has not ended."""
        removed = self._session.scalars(
            delete(Job)
            .where(Job.id == job_id, self._owned(), Job.status.in_(TERMINAL))
            .returning(Job.id)
            .execution_options(synchronize_session=False)
        ).one_or_none()
        return removed is not None

    def versions(self, jobs: Collection[Job]) -> Mapping[str, tuple[str, int, str, str | None]]:
        """Return version id → (adapter, version, digest, quarantine) of what jobs published."""
        ids = [job.version_id for job in jobs if job.version_id is not None]
        if not ids:
            return {}
        rows = self._session.execute(
            select(
                AdapterVersion.id,
                Adapter.name,
                AdapterVersion.version,
                AdapterVersion.digest,
                AdapterVersion.quarantine,
            )
            .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
            .where(AdapterVersion.id.in_(ids))
        )
        return {row[0]: (row[1], row[2], row[3], row[4]) for row in rows}

    def list(self, chosen: JobFilter, *, before: str | None, limit: int) -> Sequence[Job]:
        """Return jobs older than the id `before`, newest first."""
        query = select(Job).where(self._owned())
        wanted = (
            (Job.status, chosen.status),
            (Job.adapter_name, chosen.adapter),
            (Job.base_model, chosen.base_model),
        )
        for column, value in wanted:
            if value is not None:
                if not is_key(value):
                    return []
                query = query.where(column == value)
        if before is not None:
            query = query.where(Job.id < before)
        return self._session.scalars(query.order_by(Job.id.desc()).limit(limit)).all()

    def _owned(self) -> ColumnElement[bool]:
        return and_(Job.project_id == self._principal.project_id, Job.dry_run.is_(False))
