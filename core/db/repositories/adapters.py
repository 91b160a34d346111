"""Adapters, their versions and aliases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from core.db.models import Adapter, AdapterAlias, AdapterVersion, Job, utc_now
from core.db.repositories.dialect import insert_into, is_key
from core.errors import NotFound
from core.ids import new_id
from core.job_status import UNFINISHED


class AdapterRepository:
    """Adapters of one project.

    Args:
        session: Where the queries run.
        project_id: The owner; a worker that publishes acts for the job's project.
    """

    def __init__(self, session: Session, project_id: str) -> None:
        self._session = session
        self._project_id = project_id

    def get(self, name: str, *, lock: bool = False) -> Adapter:
        """Return an adapter.

        Args:
            lock: Let nobody else change its versions and aliases until the transaction ends.

        Raises:
            NotFound: Code `unknown_adapter`.
        """
        adapter = None
        if is_key(name):
            query = select(Adapter).where(
                Adapter.project_id == self._project_id, Adapter.name == name
            )
            if lock:
                query = query.with_for_update()
            adapter = self._session.scalars(query).one_or_none()
        if adapter is None:
            raise NotFound(f"no adapter {name!r}", code="unknown_adapter")
        return adapter

    def find_version(self, name: str, version: int) -> AdapterVersion | None:
        """Return a version by number, in one query."""
        return self._session.scalars(
            select(AdapterVersion)
            .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
            .where(
                Adapter.project_id == self._project_id,
                Adapter.name == name,
                AdapterVersion.version == version,
            )
        ).one_or_none()

    def find_aliased(self, name: str, alias: str) -> AdapterVersion | None:
        """Return the version an alias points at, in one query."""
        return self._session.scalars(
            select(AdapterVersion)
            .join(AdapterAlias, AdapterAlias.version_id == AdapterVersion.id)
            .join(Adapter, Adapter.id == AdapterAlias.adapter_id)
            .where(
                Adapter.project_id == self._project_id,
                Adapter.name == name,
                AdapterAlias.alias == alias,
            )
        ).one_or_none()

    def next_version(self, name: str) -> tuple[str, int]:
        """Take the next version number of a name, made if new; locks the adapter.

        Returns:
            The adapter's id and the number.
        """
        statement = insert_into(self._session, Adapter).values(
            id=new_id("adapter"),
            project_id=self._project_id,
            name=name,
            last_version=1,
            created_at=utc_now(),
        )
        row = self._session.execute(
            statement.on_conflict_do_update(
                index_elements=["project_id", "name"],
                set_={"last_version": Adapter.last_version + 1},
            ).returning(Adapter.id, Adapter.last_version)
        ).one()
        return row[0], row[1]

    def has_digest(self, digest: str) -> bool:
        """Tell whether a version of the project has a digest."""
        return bool(
            self._session.scalar(
                select(
                    exists().where(
                        AdapterVersion.digest == digest,
                        AdapterVersion.project_id == self._project_id,
                    )
                )
            )
        )

    def list_digests(self, adapter_id: str) -> Sequence[str]:
        """Return the digests of an adapter's versions, sorted."""
        return self._session.scalars(
            select(AdapterVersion.digest)
            .where(AdapterVersion.adapter_id == adapter_id)
            .distinct()
            .order_by(AdapterVersion.digest)
        ).all()

    def find_continuing(self, digests: Sequence[str]) -> str | None:
        """Return an unfinished job of the project that goes on from one of some digests."""
        return self._session.scalars(
            select(Job.id)
            .where(
                Job.continue_digest.in_(digests),
                Job.project_id == self._project_id,
                Job.status.in_(UNFINISHED),
            )
            .limit(1)
        ).one_or_none()

    def add(self, version: AdapterVersion) -> None:
        """Insert a version."""
        self._session.add(version)
        self._session.flush()

    def point(self, adapter_id: str, alias: str, version_id: str) -> None:
        """Make an alias point at a version."""
        moved = {"version_id": version_id, "updated_at": utc_now()}
        self._session.execute(
            insert_into(self._session, AdapterAlias)
            .values(adapter_id=adapter_id, alias=alias, pinned=False, **moved)
            .on_conflict_do_update(index_elements=["adapter_id", "alias"], set_=moved)
        )

    def pin(self, adapter_id: str, alias: str, *, pinned: bool) -> bool:
        """Say whether engines keep what an alias points at; False when there is no such alias."""
        changed = self._session.scalars(
            update(AdapterAlias)
            .where(AdapterAlias.adapter_id == adapter_id, AdapterAlias.alias == alias)
            .values(pinned=pinned)
            .returning(AdapterAlias.alias)
        )
        return changed.one_or_none() is not None

    def pinned_aliases(self, adapter_ids: Collection[str]) -> Mapping[str, list[str]]:
        """Return adapter id → its pinned aliases, sorted."""
        found: dict[str, list[str]] = {}
        rows = self._session.execute(
            select(AdapterAlias.adapter_id, AdapterAlias.alias)
            .where(AdapterAlias.adapter_id.in_(adapter_ids), AdapterAlias.pinned)
            .order_by(AdapterAlias.alias)
        )
        for adapter_id, alias in rows:
            found.setdefault(adapter_id, []).append(alias)
        return found

    def remove_alias(self, adapter_id: str, alias: str) -> bool:
        """Remove an alias; False when there is none."""
        removed = self._session.scalars(
            delete(AdapterAlias)
            .where(AdapterAlias.adapter_id == adapter_id, AdapterAlias.alias == alias)
            .returning(AdapterAlias.alias)
        )
        return removed.one_or_none() is not None

    def delete_version(self, version: AdapterVersion) -> None:
        """Remove a version that no alias points at."""
        self._session.execute(delete(AdapterVersion).where(AdapterVersion.id == version.id))

    def delete(self, adapter: Adapter) -> Sequence[str]:
        """Remove an adapter with its versions and aliases; return the versions' digests."""
        digests = self.list_digests(adapter.id)
        for model in (AdapterAlias, AdapterVersion):
            self._session.execute(
                delete(model)
                .where(model.adapter_id == adapter.id)
                .execution_options(synchronize_session=False)
            )
        self._session.execute(delete(Adapter).where(Adapter.id == adapter.id))
        return digests

    def newest_of(self, name: str) -> int | None:
        """Return the highest version number of a name."""
        return self._session.scalar(
            select(func.max(AdapterVersion.version))
            .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
            .where(Adapter.project_id == self._project_id, Adapter.name == name)
        )

    def newest(self, adapter_id: str, *, other_than: str) -> AdapterVersion | None:
        """Return the version of the highest number that an alias may get, but the one excluded."""
        return self._session.scalars(
            select(AdapterVersion)
            .where(
                AdapterVersion.adapter_id == adapter_id,
                AdapterVersion.id != other_than,
                AdapterVersion.quarantine.is_(None),
            )
            .order_by(AdapterVersion.version.desc())
            .limit(1)
        ).one_or_none()

    def aliases(self, adapter_ids: Collection[str]) -> Mapping[str, Mapping[str, AdapterVersion]]:
        """Return adapter id → alias → version, aliases sorted."""
        found: dict[str, dict[str, AdapterVersion]] = {}
        rows = self._session.execute(
            select(AdapterAlias.adapter_id, AdapterAlias.alias, AdapterVersion)
            .join(AdapterVersion, AdapterVersion.id == AdapterAlias.version_id)
            .where(AdapterAlias.adapter_id.in_(adapter_ids))
            .order_by(AdapterAlias.alias)
        )
        for adapter_id, alias, version in rows:
            found.setdefault(adapter_id, {})[alias] = version
        return found

    def count_versions(self, adapter_ids: Collection[str]) -> Mapping[str, int]:
        """Return adapter id → number of versions, adapters without any left out."""
        rows = self._session.execute(
            select(AdapterVersion.adapter_id, func.count())
            .where(AdapterVersion.adapter_id.in_(adapter_ids))
            .group_by(AdapterVersion.adapter_id)
        )
        return {row[0]: row[1] for row in rows}

    def list_versions(
        self, adapter_id: str, *, before: int | None, limit: int
    ) -> Sequence[AdapterVersion]:
        """Return versions with a number below `before`, newest first."""
        query = select(AdapterVersion).where(AdapterVersion.adapter_id == adapter_id)
        if before is not None:
            query = query.where(AdapterVersion.version < before)
        return self._session.scalars(
            query.order_by(AdapterVersion.version.desc()).limit(limit)
        ).all()

    def list(self, *, before: str | None, limit: int) -> Sequence[Adapter]:
        """Return adapters older than the id `before`, newest first."""
        query = select(Adapter).where(Adapter.project_id == self._project_id)
        if before is not None:
            query = query.where(Adapter.id < before)
        return self._session.scalars(query.order_by(Adapter.id.desc()).limit(limit)).all()


def is_referenced(session: Session, digest: str) -> bool:
    """Tell whether a version of any project has this digest or an unfinished job needs it."""
    version = exists().where(AdapterVersion.digest == digest)
    job = exists().where(Job.continue_digest == digest, Job.status.in_(UNFINISHED))
    return bool(session.scalar(select(or_(version, job))))


def pinned_versions(session: Session) -> Sequence[tuple[str, str]]:
    """Return (base digest, digest) of what pinned aliases of all projects point at, sorted."""
    rows = session.execute(
        select(AdapterVersion.base_digest, AdapterVersion.digest)
        .join(AdapterAlias, AdapterAlias.version_id == AdapterVersion.id)
        .where(AdapterAlias.pinned)
        .distinct()
        .order_by(AdapterVersion.base_digest, AdapterVersion.digest)
    )
    return [(base_digest, digest) for base_digest, digest in rows]
