"""The end of versions and adapters, and of the files that nobody refers to any more."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from core.db.repositories.adapters import AdapterRepository, is_referenced
from core.db.repositories.dialect import lock_content
from core.db.session import Database
from core.errors import Conflict
from core.principal import Principal
from core.registry.views import aliases_by_version, version_row
from core.storage import ArtifactStore


def delete_version(
    session: Session, principal: Principal, name: str, version: int, *, force: bool = False
) -> str:
    """Retire a version; its number is not given again.

    The caller commits and then calls `discard_artifact` with the digest returned.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter.
        version: The version.
        force: Move aliases that point at it to the newest version left, or remove them.

    Raises:
        NotFound: Code `unknown_adapter` or `unknown_version`.
        Conflict: Code `alias_points_here`, or `continued_by_job` when an unfinished job goes on
            from it.
    """
    adapters = AdapterRepository(session, principal.project_id)
    _check_not_continued(session, adapters, [version_row(adapters, name, version).digest])
    adapter = adapters.get(name, lock=True)
    row = version_row(adapters, name, version)
    pointing = aliases_by_version(adapters, adapter.id).get(row.id, [])
    if pointing and not force:
        raise Conflict(
            f"the alias {pointing[0]!r} points at version {version} of {name!r}",
            code="alias_points_here",
            hint="Move the alias first, or delete with force=true.",
        )
    heir = adapters.newest(adapter.id, other_than=row.id)
    for alias in pointing:
        if heir is None:
            adapters.remove_alias(adapter.id, alias)
        else:
            adapters.point(adapter.id, alias, heir.id)
    adapters.delete_version(row)
    return row.digest


def delete_adapter(
    session: Session, principal: Principal, name: str, *, force: bool = False
) -> list[str]:
    """Retire an adapter with all versions.

    The caller commits and then calls `discard_artifact` with each digest returned.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter.
        force: Even though aliases point at its versions.

    Raises:
        NotFound: Code `unknown_adapter`.
        Conflict: Code `alias_points_here`, or `continued_by_job` when an unfinished job goes on
            from one of its versions.
    """
    adapters = AdapterRepository(session, principal.project_id)
    _check_not_continued(session, adapters, adapters.list_digests(adapters.get(name).id))
    adapter = adapters.get(name, lock=True)
    aliases = adapters.aliases([adapter.id]).get(adapter.id, {})
    if aliases and not force:
        raise Conflict(
            f"aliases point at versions of {name!r}: {', '.join(aliases)}",
            code="alias_points_here",
            hint="Delete with force=true to remove the aliases too.",
        )
    return list(adapters.delete(adapter))


def unreferenced_digest(session: Session, digest: str) -> bool:
    """Tell whether no version has this digest and no unfinished job goes on from it."""
    return not is_referenced(session, digest)


def discard_artifact(database: Database, store: ArtifactStore, digest: str) -> bool:
    """Delete an artifact's files unless a version or an unfinished job still needs them.

    Returns:
        Whether they were deleted.
    """
    with database.session(write=True) as session:
        lock_content(session, digest)
        if not unreferenced_digest(session, digest):
            return False
        # Inside the transaction, so that no equal artifact is published between check and deletion.
        store.delete_adapter(digest)
        return True


def _check_not_continued(
    session: Session, adapters: AdapterRepository, digests: Sequence[str]
) -> None:
    # From here on no submission can make a job that goes on from one of them.
    for digest in digests:
        lock_content(session, digest)
    job_id = adapters.find_continuing(digests)
    if job_id is not None:
        raise Conflict(
            f"job {job_id} goes on from this adapter and has not ended",
            code="continued_by_job",
            hint="Cancel the job first, or wait for its end.",
        )
