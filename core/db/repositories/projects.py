"""Projects and their API keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from core.db.models import AdapterVersion, ApiKey, Dataset, Export, Job, Project, utc_now
from core.db.repositories.dialect import insert_into, is_key
from core.errors import NotFound
from core.ids import new_id


class ProjectRepository:
    """Projects, which own everything else."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def ensure(self, name: str) -> Project:
        """Return the project of this name, made if there is none."""
        self._session.execute(
            insert_into(self._session, Project)
            .values(id=new_id("project"), name=name, created_at=utc_now())
            .on_conflict_do_nothing(index_elements=["name"])
        )
        return self._session.scalars(select(Project).where(Project.name == name)).one()

    def find(self, project_id: str, *, lock: bool = False) -> Project | None:
        """Return a project, read afresh.

        Args:
            project_id: Which.
            lock: Let nobody else who locks it go on until the transaction ends. Rows that refer to
                the project can still be written.
        """
        query = select(Project).where(Project.id == project_id)
        if lock:
            query = query.with_for_update(key_share=True)
        return self._session.scalars(query.execution_options(populate_existing=True)).one_or_none()

    def get_by_name(self, name: str) -> Project:
        """Return a project.

        Raises:
            NotFound: Code `unknown_project`.
        """
        project = None
        if is_key(name):
            project = self._session.scalars(
                select(Project).where(Project.name == name)
            ).one_or_none()
        if project is None:
            raise NotFound(
                f"no project {name!r}",
                code="unknown_project",
                hint="`tunesmith projects list` shows all; `tunesmith keys create` makes one.",
            )
        return project

    def list(self) -> Sequence[Project]:
        """Return all projects by name."""
        return self._session.scalars(select(Project).order_by(Project.name)).all()

    def count_waiting_jobs(self, project_id: str) -> int:
        """Count the unfinished jobs that are not in training, paused ones included."""
        return self._count_jobs(project_id, ("validating", "queued", "paused"))

    def count_running_jobs(self, project_id: str) -> int:
        """Count the jobs in training."""
        return self._count_jobs(project_id, ("running",))

    def sum_stored(self, project_id: str) -> tuple[int, int]:
        """Return the rows of all data sets, and the bytes of these, all adapters and exports."""
        rows, dataset_bytes = self._session.execute(
            select(func.sum(Dataset.rows), func.sum(Dataset.bytes)).where(
                Dataset.project_id == project_id
            )
        ).one()
        adapter_bytes = self._session.scalar(
            select(func.sum(AdapterVersion.bytes)).where(AdapterVersion.project_id == project_id)
        )
        export_bytes = self._session.scalar(
            select(func.sum(Export.bytes)).where(Export.project_id == project_id)
        )
        stored = (dataset_bytes, adapter_bytes, export_bytes)
        return int(rows or 0), sum(int(one or 0) for one in stored)

    def _count_jobs(self, project_id: str, statuses: tuple[str, ...]) -> int:
        query = select(func.count()).where(
            Job.project_id == project_id, Job.status.in_(statuses), Job.dry_run.is_(False)
        )
        return self._session.scalar(query) or 0


class ApiKeyRepository:
    """API keys of all projects; only the operator lists and revokes them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, key_id: str) -> tuple[ApiKey, str]:
        """Return a key and its project's name.

        Raises:
            NotFound: Code `unknown_key`.
        """
        row = None
        if is_key(key_id):
            row = self._session.execute(
                select(ApiKey, Project.name)
                .join(Project, Project.id == ApiKey.project_id)
                .where(ApiKey.id == key_id)
            ).one_or_none()
        if row is None:
            raise NotFound(f"no API key {key_id!r}", code="unknown_key")
        return row[0], row[1]

    def find_active(self, key_hash: str) -> ApiKey | None:
        """Return the key with this hash unless it was revoked."""
        return self._session.scalars(
            select(ApiKey).where(ApiKey.key_hash == key_hash, ApiKey.revoked_at.is_(None))
        ).one_or_none()

    def add(self, key: ApiKey) -> None:
        """Insert a key."""
        self._session.add(key)
        self._session.flush()

    def revoke(self, key_id: str) -> None:
        """Mark a key revoked; the time of the first revocation stays."""
        self._session.execute(
            update(ApiKey)
            .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            .values(revoked_at=utc_now())
        )

    def list(self) -> Sequence[tuple[ApiKey, str]]:
        """Return all keys with their project's name, oldest first."""
        rows = self._session.execute(
            select(ApiKey, Project.name)
            .join(Project, Project.id == ApiKey.project_id)
            .order_by(ApiKey.id)
        )
        return [(row[0], row[1]) for row in rows]
