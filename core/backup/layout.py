"""What a backup looks like on disk.

    manifest.json              what there is, with the SHA-256 of every file; written last
    tables/NAME.jsonl          one row a line
    blobs/SHA256               data sets and checkpoints
    adapters/DIGEST/FILE       published adapters

It is the same for every database and every store, so a backup of one kind restores into another.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, Field, ValidationError

from core.db.repositories.backup import ColumnKind
from core.errors import InvalidInput

MANIFEST = "manifest.json"

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how far it is, and how far it goes where that is known."""

_CHUNK_BYTES = 1024**2
_PATH = re.compile(r"tables/[a-z_]+\.jsonl|blobs/[0-9a-f]{64}|adapters/[0-9a-f]{64}/[\w-][\w.-]*")


class TableEntry(BaseModel):
    """A table: its rows are in `tables/NAME.jsonl`."""

    name: str = Field(pattern=r"^[a-z_]+$")
    rows: int
    columns: dict[str, ColumnKind]


class FileEntry(BaseModel):
    """A file of the backup."""

    path: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a backup holds.

    Attributes:
        format_version: Of this layout.
        created_at: The instant that the rows show.
        revision: Of the schema that the rows are from.
        tables: Each behind those that it refers to.
        blobs: SHA-256 of each.
        adapters: Digest of each.
        deleted: Blobs and adapters that rows refer to but that were deleted on purpose while the
            backup was made.
        damaged: Those that the store had lost or altered.
        files: All files but this one.
    """

    format_version: Literal[1] = 1
    created_at: datetime
    revision: str
    tables: list[TableEntry]
    blobs: list[str] = []
    adapters: list[str] = []
    deleted: list[str] = []
    damaged: list[str] = []
    files: list[FileEntry] = []

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


def write_file(root: Path, path: str, chunks: Iterable[bytes]) -> FileEntry:
    """Write a file that only its owner may read, durably, and return what it is."""
    target = root / path
    for folder in reversed(Path(path).parents):
        (root / folder).mkdir(mode=0o700, exist_ok=True)
    hasher, size = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            hasher.update(chunk)
            size += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(path=path, bytes=size, sha256=hasher.hexdigest())


def read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield what a stream holds, piece by piece, and close it."""
    with stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def encode_row(row: dict[str, Any]) -> bytes:
    """Return a row as one line of JSON."""
    return json.dumps(row, default=datetime.isoformat, ensure_ascii=False).encode() + b"\n"


def decode_rows(path: Path, entry: TableEntry) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table."""
    times = [name for name, kind in entry.columns.items() if kind == "time"]
    with path.open("rb") as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            for name in times:
                if row[name] is not None:
                    row[name] = datetime.fromisoformat(row[name])
            yield row


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of a backup.

    Raises:
        InvalidInput: Code `no_backup` or `backup_damaged`.
    """
    try:
        text = (root / MANIFEST).read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{root} is no complete backup: {error.strerror} for {MANIFEST}",
            code="no_backup",
            hint="Give a directory that `tunesmith backup` made.",
        ) from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(f"{MANIFEST} cannot be read: {error.errors()[0]['msg']}") from error
    for file in manifest.files:
        if not _PATH.fullmatch(file.path):
            raise _damaged(f"{file.path[:80]!r} is no file of a backup")
    return manifest


def verify(root: Path, progress: Progress) -> Manifest:
    """Check every file of a backup against its hash and return the manifest.

    Raises:
        InvalidInput: Code `no_backup` or `backup_damaged`.
    """
    manifest = read_manifest(root)
    done = 0
    for file in manifest.files:
        progress("checking", done, manifest.bytes)
        try:
            with (root / file.path).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise _damaged(f"{file.path}: {error.strerror}") from error
        if digest != file.sha256:
            raise _damaged(f"{file.path} is not what was written")
        done += file.bytes
    progress("checking", done, manifest.bytes)
    listed = {file.path for file in manifest.files}
    for table in manifest.tables:
        if f"tables/{table.name}.jsonl" not in listed:
            raise _damaged(f"the rows of {table.name} are missing")
    return manifest


def _damaged(message: str) -> InvalidInput:
    return InvalidInput(
        message, code="backup_damaged", hint="Take another backup, or another copy of this one."
    )
