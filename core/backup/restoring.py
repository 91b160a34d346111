"""Brings a backup back into an empty database and an empty store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import migrations
from core import registry
from core.backup.layout import (
    Manifest,
    Progress,
    TableEntry,
    decode_rows,
    read_chunks,
    verify,
)
from core.db.repositories.backup import (
    clear_projects,
    forget_blob,
    list_occupied,
    list_versions_of,
    load_rows,
)
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.claims import ClaimRepository
from core.db.session import Database
from core.errors import Conflict, InvalidInput
from core.principal import Principal
from core.storage import ArtifactStore

_JOBS = 100


@dataclass(frozen=True)
class Restored:
    """What came back.

    Attributes:
        manifest: Of the backup.
        requeued: Jobs that were at work when the backup was made; they wait again.
        models_elsewhere: Base models whose files are not where they were, with that place.
    """

    manifest: Manifest
    requeued: int
    models_elsewhere: dict[str, str]


def restore_backup(
    root: Path, url: str, store: ArtifactStore, progress: Progress = lambda *_: None
) -> Restored:
    """Restore a backup, whatever kinds of database and store it is of.

    Objects first, rows last and in one transaction: a restore that is interrupted can be repeated.

    Args:
        root: The backup.
        url: Of a database without data; the schema is made, or moved along, as needed.
        store: Without objects other than those of the backup.
        progress: Told how far it is.

    Raises:
        InvalidInput: `no_backup`, `backup_damaged`, or `backup_too_new` for this version.
        Conflict: Code `not_empty`.
    """
    manifest = verify(root, progress)
    if not migrations.knows(manifest.revision):
        raise InvalidInput(
            f"the backup's schema {manifest.revision} is not known to this version",
            code="backup_too_new",
            hint="Restore it with the version that made it, or a newer one.",
        )
    _check_empty(url, store, manifest)
    _restore_objects(root, store, manifest, progress)
    _prepare_schema(url, manifest.revision)
    database = Database(url)
    try:
        _restore_rows(root, database, manifest, progress)
        migrations.upgrade(url)
        _forget_deleted(database, manifest)
        return Restored(manifest, _requeue(database), _models_elsewhere(database))
    finally:
        database.close()


def _check_empty(url: str, store: ArtifactStore, manifest: Manifest) -> None:
    if migrations.current(url) is not None:
        database = Database(url)
        try:
            occupied = list_occupied(database)
        finally:
            database.close()
        if occupied:
            raise Conflict(
                f"the database has rows in {', '.join(occupied)}",
                code="not_empty",
                hint="Restore into a new database, or one that was emptied.",
            )
    for kind, listing, own in (
        ("blobs", store.list_blobs, set(manifest.blobs)),
        ("adapters", store.list_adapters, set(manifest.adapters)),
    ):
        if any(entry.name not in own for entry in listing()):
            raise Conflict(
                f"the artifact store has {kind} that are not of this backup",
                code="not_empty",
                hint="Restore into a new place: a store belongs to one database.",
            )


def _restore_objects(
    root: Path, store: ArtifactStore, manifest: Manifest, progress: Progress
) -> None:
    total = len(manifest.blobs) + len(manifest.adapters)
    for number, name in enumerate(manifest.blobs):
        progress("storing objects", number, total)
        path = root / "blobs" / name
        if not store.has_blob(name):
            store.write_blob(read_chunks(path.open("rb")), path.stat().st_size)
    for number, name in enumerate(manifest.adapters, len(manifest.blobs)):
        progress("storing objects", number, total)
        if not store.has_adapter(name):
            store.publish_adapter(root / "adapters" / name)
    progress("storing objects", total, total)


def _prepare_schema(url: str, revision: str) -> None:
    """Make the schema that the rows are from; there is nothing in the database to lose."""
    if migrations.current(url) not in (None, revision):
        migrations.downgrade(url, "base")
    migrations.upgrade(url, revision)


def _restore_rows(root: Path, database: Database, manifest: Manifest, progress: Progress) -> None:
    with database.engine.execution_options(write=True).begin() as connection:
        clear_projects(connection)
        for entry in manifest.tables:
            progress(f"rows of {entry.name}", 0, entry.rows)
            rows = decode_rows(root / "tables" / f"{entry.name}.jsonl", entry)
            if entry.name == "jobs":
                rows = _without_workers(rows, entry)
            loaded = load_rows(connection, entry.name, entry.columns, rows)
            progress(f"rows of {entry.name}", loaded, entry.rows)


def _without_workers(rows: Iterator[dict[str, Any]], entry: TableEntry) -> Iterator[dict[str, Any]]:
    """Let the leases of jobs have ended: those who held them are not here."""
    for row in rows:
        if row["worker_id"] is not None:
            row["lease_expires_epoch"] = 0.0
            if "attempt_started_epoch" in entry.columns:
                # Otherwise the time since the backup would count as time under work.
                row["attempt_started_epoch"] = None
        yield row


def _requeue(database: Database) -> int:
    """Let jobs wait again that were at work; no attempt of theirs counts as lost."""
    requeued = 0
    while True:
        with database.session(write=True) as session:
            claims = ClaimRepository(session, "")
            held = claims.list_expired(_JOBS)
            for job in held:
                claims.requeue_lost(job, ("requeued", {"reason": "restored from a backup"}))
        requeued += len(held)
        if len(held) < _JOBS:
            return requeued


def _forget_deleted(database: Database, manifest: Manifest) -> None:
    """Delete here too what was deleted while the backup was made, whose bytes it lacks."""
    with database.session(write=True) as session:
        for name in manifest.deleted:
            forget_blob(session, name)
            for project_id, adapter, version in list_versions_of(session, name):
                owner = Principal(project_id, frozenset())
                registry.delete_version(session, owner, adapter, version, force=True)


def _models_elsewhere(database: Database) -> dict[str, str]:
    with database.session() as session:
        models = BaseModelRepository(session).list()
    return {model.name: model.path for model in models if not Path(model.path).is_dir()}
