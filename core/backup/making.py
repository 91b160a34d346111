"""Makes a backup of the database and the store while both are in use."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table

from core.artifacts import MANIFEST_FILE as ADAPTER_MANIFEST
from core.artifacts import ArtifactFile, digest_of
from core.backup.layout import (
    MANIFEST,
    FileEntry,
    Manifest,
    Progress,
    TableEntry,
    encode_row,
    read_chunks,
    write_file,
)
from core.db.models import utc_now
from core.db.repositories.backup import column_kinds, kept_tables, read_rows, snapshot
from core.db.repositories.housekeeping import HousekeepingRepository
from core.db.session import Database
from core.errors import Conflict, NotFound, Unavailable
from core.storage import ArtifactStore

_TELL_EVERY_ROWS = 1000


class _References:
    """What the rows that were written refer to in the store."""

    def __init__(self) -> None:
        self.blobs: set[str] = set()
        self.adapters: set[str] = set()

    def note(self, table: str, row: dict[str, Any]) -> None:
        if table == "datasets" or (table == "job_checkpoints" and row["invalid_reason"] is None):
            self.blobs.add(str(row["sha256"]))
        elif table == "adapter_versions":
            self.adapters.add(str(row["digest"]))


def create_backup(
    database: Database,
    store: ArtifactStore,
    revision: str,
    target: Path,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Write a backup of everything but base models' files into a new directory.

    The rows are those of one instant. Objects in the store never change, so they are copied
    afterwards; one that was deleted since is left out and named in the manifest. The directory
    appears under its name when it is complete.

    Args:
        database: What to back up; at `revision`.
        store: What to back up.
        revision: Of the schema.
        target: The directory; must not exist, or be empty.
        progress: Told how far it is.

    Raises:
        Conflict: Code `backup_exists`.
        Unavailable: Code `backup_not_written`, or the store cannot be reached.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(
            f"{target} exists already",
            code="backup_exists",
            hint="Give every backup a directory of its own.",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".incomplete", dir=target.parent)
        )
        try:
            manifest = _fill(aside, database, store, revision, progress)
            aside.replace(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise Unavailable(
            f"the backup cannot be written: {error}",
            code="backup_not_written",
            hint="Is there space left, and may this user write there?",
        ) from error
    return manifest


def _fill(
    root: Path, database: Database, store: ArtifactStore, revision: str, progress: Progress
) -> Manifest:
    references = _References()
    with snapshot(database) as connection:
        manifest = Manifest(created_at=utc_now(), revision=revision, tables=[])
        for table in kept_tables():
            _write_table(root, connection, table, manifest, references, progress)
    total = len(references.blobs) + len(references.adapters)
    copies = (
        *((name, manifest.blobs, _copy_blob) for name in sorted(references.blobs)),
        *((name, manifest.adapters, _copy_adapter) for name in sorted(references.adapters)),
    )
    for number, (name, whole, copy) in enumerate(copies):
        progress("copying objects", number, total)
        files = copy(root, store, name)
        if files is not None:
            manifest.files += files
            whole.append(name)
        elif _is_referenced(database, name):
            manifest.damaged.append(name)
        else:
            manifest.deleted.append(name)
    progress("copying objects", total, total)
    write_file(root, MANIFEST, [manifest.model_dump_json(indent=1).encode()])
    _sync(root)
    return manifest


def _write_table(
    root: Path,
    connection: Connection,
    table: Table,
    manifest: Manifest,
    references: _References,
    progress: Progress,
) -> None:
    entry = TableEntry(name=table.name, rows=0, columns=column_kinds(table))

    def lines() -> Iterator[bytes]:
        for row in read_rows(connection, table):
            references.note(table.name, row)
            entry.rows += 1
            if entry.rows % _TELL_EVERY_ROWS == 0:
                progress(f"rows of {table.name}", entry.rows, None)
            yield encode_row(row)

    manifest.files.append(write_file(root, f"tables/{table.name}.jsonl", lines()))
    manifest.tables.append(entry)


def _copy_blob(root: Path, store: ArtifactStore, sha256: str) -> list[FileEntry] | None:
    """Copy a blob; `None` when the store has it no more, or not as it was."""
    path = f"blobs/{sha256}"
    try:
        file = write_file(root, path, read_chunks(store.open_blob(sha256)))
    except (NotFound, Conflict):
        file = None
    if file is None or file.sha256 != sha256:
        (root / path).unlink(missing_ok=True)
        return None
    return [file]


def _copy_adapter(root: Path, store: ArtifactStore, digest: str) -> list[FileEntry] | None:
    """Copy an adapter's files; `None` when the store has them no more, or not as they were."""
    folder = f"adapters/{digest}"
    files: dict[str, FileEntry] = {}
    with suppress(NotFound, Conflict), ExitStack() as stack:
        streams = store.open_adapter(digest)
        for stream in streams.values():
            stack.enter_context(stream)
        for name, stream in streams.items():
            files[name] = write_file(root, f"{folder}/{name}", read_chunks(stream))
    if ADAPTER_MANIFEST not in files or _digest(files.items()) != digest:
        shutil.rmtree(root / folder, ignore_errors=True)
        return None
    return list(files.values())


def _digest(files: Iterable[tuple[str, FileEntry]]) -> str:
    return digest_of(
        ArtifactFile(path=name, bytes=file.bytes, sha256=file.sha256)
        for name, file in files
        if name != ADAPTER_MANIFEST
    )


def _is_referenced(database: Database, name: str) -> bool:
    with database.session() as session:
        rows = HousekeepingRepository(session)
        return bool(rows.referenced_blobs([name]) or rows.referenced_adapters([name]))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
