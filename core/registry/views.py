"""What the owner of an adapter reads."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from core.db.models import Adapter, AdapterVersion
from core.db.repositories.adapters import AdapterRepository
from core.errors import NotFound
from core.principal import Principal
from core.reads import (
    AdapterRead,
    Page,
    VersionRead,
    decode_cursor,
    encode_cursor,
    invalid_cursor,
)
from core.registry.references import LATEST


def list_adapters(
    session: Session, principal: Principal, *, cursor: str | None = None, limit: int = 20
) -> Page[AdapterRead]:
    """Return a page of adapters, newest first.

    Raises:
        InvalidInput: Code `invalid_cursor`.
    """
    adapters = AdapterRepository(session, principal.project_id)
    before = decode_cursor(cursor) if cursor else None
    rows = adapters.list(before=before, limit=limit + 1)
    shown, more = rows[:limit], len(rows) > limit
    ids = [row.id for row in shown]
    aliases, counts = adapters.aliases(ids), adapters.count_versions(ids)
    pinned = adapters.pinned_aliases(ids)
    data = [
        _adapter_read(row, aliases.get(row.id, {}), pinned.get(row.id, []), counts.get(row.id, 0))
        for row in shown
    ]
    return Page(data=data, next_cursor=encode_cursor(shown[-1].id) if more else None)


def get_adapter(session: Session, principal: Principal, name: str) -> AdapterRead:
    """Return an adapter.

    Raises:
        NotFound: Code `unknown_adapter`.
    """
    adapters = AdapterRepository(session, principal.project_id)
    row = adapters.get(name)
    targets = adapters.aliases([row.id]).get(row.id, {})
    pinned = adapters.pinned_aliases([row.id]).get(row.id, [])
    return _adapter_read(row, targets, pinned, adapters.count_versions([row.id]).get(row.id, 0))


def list_versions(
    session: Session,
    principal: Principal,
    name: str,
    *,
    cursor: str | None = None,
    limit: int = 20,
) -> Page[VersionRead]:
    """Return a page of an adapter's versions, newest first.

    Raises:
        NotFound: Code `unknown_adapter`.
        InvalidInput: Code `invalid_cursor`.
    """
    adapters = AdapterRepository(session, principal.project_id)
    adapter = adapters.get(name)
    before = _version_position(cursor) if cursor else None
    rows = adapters.list_versions(adapter.id, before=before, limit=limit + 1)
    shown, more = rows[:limit], len(rows) > limit
    aliases = aliases_by_version(adapters, adapter.id)
    return Page(
        data=[_version_read(name, row, aliases.get(row.id, [])) for row in shown],
        next_cursor=encode_cursor(str(shown[-1].version)) if more else None,
    )


def get_version(session: Session, principal: Principal, name: str, version: int) -> VersionRead:
    """Return a version.

    Raises:
        NotFound: Code `unknown_adapter` or `unknown_version`.
    """
    adapters = AdapterRepository(session, principal.project_id)
    adapter = adapters.get(name)
    row = version_row(adapters, name, version)
    return _version_read(name, row, aliases_by_version(adapters, adapter.id).get(row.id, []))


def version_row(adapters: AdapterRepository, name: str, version: int) -> AdapterVersion:
    """Return the row of a version.

    Raises:
        NotFound: Code `unknown_version`.
    """
    row = adapters.find_version(name, version) if 0 < version < 2**31 else None
    if row is None:
        raise NotFound(f"{name!r} has no version {version}", code="unknown_version")
    return row


def aliases_by_version(adapters: AdapterRepository, adapter_id: str) -> dict[str, list[str]]:
    """Return version id → the aliases that point at it."""
    found: dict[str, list[str]] = {}
    for alias, version in adapters.aliases([adapter_id]).get(adapter_id, {}).items():
        found.setdefault(version.id, []).append(alias)
    return found


def _adapter_read(
    row: Adapter, targets: Mapping[str, AdapterVersion], pinned: list[str], versions: int
) -> AdapterRead:
    latest = targets.get(LATEST)
    return AdapterRead(
        name=row.name,
        base_model=latest.base_model if latest else None,
        latest=latest.version if latest else None,
        aliases={alias: version.version for alias, version in targets.items()},
        pinned=pinned,
        versions=versions,
        created_at=row.created_at,
    )


def _version_position(cursor: str) -> int:
    position = decode_cursor(cursor)
    if not position.isdecimal() or len(position) > 9:
        raise invalid_cursor()
    return int(position)


def _version_read(name: str, row: AdapterVersion, aliases: list[str]) -> VersionRead:
    return VersionRead(
        adapter=name,
        version=row.version,
        digest=row.digest,
        bytes=row.bytes,
        base_model=row.base_model,
        base_digest=row.base_digest,
        origin=row.origin,
        job_id=row.job_id,
        aliases=aliases,
        quarantine=row.quarantine,
        manifest=row.manifest,
        provenance=row.provenance,
        created_at=row.created_at,
    )
