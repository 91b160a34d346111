"""Projects and their API keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from core.db.models import ApiKey, Project, utc_now
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
