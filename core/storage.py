"""The artifact store: data set bytes and published adapters, addressed by their content.

Owns the durability of files: written aside, synced, then renamed, so that a reader sees all of an
object or nothing. Knows no database: who may read or delete an object is decided by the callers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from core.artifacts import Manifest, check_size, read_manifest, verify_files
from core.errors import NotFound
from core.ids import new_id


@dataclass(frozen=True)
class Blob:
    """Stored bytes, named by their hash."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter directory in the store; `bytes` is the sum over its files."""

    digest: str
    bytes: int
    manifest: Manifest


class ArtifactStore(Protocol):
    """Where artifacts live. Objects are immutable; storing an object again changes nothing."""

    def write_blob(self, chunks: Iterable[bytes], max_bytes: int) -> Blob:
        """Store a stream of bytes.

        Raises:
            TooLarge: The stream is longer than `max_bytes`; nothing is kept.
        """
        ...

    def open_blob(self, sha256: str) -> BinaryIO:
        """Open stored bytes for reading.

        Raises:
            NotFound: There is no such blob.
        """
        ...

    def blob_path(self, sha256: str) -> Path:
        """Return a local path of stored bytes; must not be written to.

        Raises:
            NotFound: There is no such blob.
        """
        ...

    def has_blob(self, sha256: str) -> bool:
        """Tell whether bytes are stored."""
        ...

    def delete_blob(self, sha256: str) -> None:
        """Remove stored bytes; removing what is not there is no error."""
        ...

    def publish_adapter(self, source: Path) -> PublishedAdapter:
        """Store a complete artifact directory under its digest.

        Raises:
            InvalidInput: The files do not match the manifest.
        """
        ...

    def adapter_path(self, digest: str) -> Path:
        """Return a local directory of a published adapter; must not be written to.

        Raises:
            NotFound: There is no such adapter.
        """
        ...

    def has_adapter(self, digest: str) -> bool:
        """Tell whether an adapter is published."""
        ...

    def delete_adapter(self, digest: str) -> None:
        """Remove a published adapter; removing what is not there is no error."""
        ...


class LocalStore:
    """An artifact store in a directory of this machine.

    Args:
        root: The data directory; `blobs/`, `adapters/` and `tmp/` are made below it.
    """

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._adapters = root / "adapters"
        self._tmp = root / "tmp"
        for directory in (self._blobs, self._adapters, self._tmp):
            directory.mkdir(parents=True, exist_ok=True)

    def write_blob(self, chunks: Iterable[bytes], max_bytes: int) -> Blob:
        """Store a stream of bytes; see `ArtifactStore`."""
        temporary = self._tmp / new_id("blob")
        hasher, size = hashlib.sha256(), 0
        try:
            with temporary.open("xb") as stream:
                for chunk in chunks:
                    size += len(chunk)
                    check_size(size, max_bytes, "the upload")
                    hasher.update(chunk)
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self._blobs / hasher.hexdigest())
            _sync_directory(self._blobs)
        finally:
            temporary.unlink(missing_ok=True)
        return Blob(hasher.hexdigest(), size)

    def open_blob(self, sha256: str) -> BinaryIO:
        """Open stored bytes; see `ArtifactStore`."""
        return self.blob_path(sha256).open("rb")

    def blob_path(self, sha256: str) -> Path:
        """Return the path of stored bytes; see `ArtifactStore`."""
        path = self._blobs / sha256
        if not path.is_file():
            raise NotFound(f"no stored bytes {sha256[:12]}…", code="blob_missing")
        return path

    def has_blob(self, sha256: str) -> bool:
        """Tell whether bytes are stored; see `ArtifactStore`."""
        return (self._blobs / sha256).is_file()

    def delete_blob(self, sha256: str) -> None:
        """Remove stored bytes; see `ArtifactStore`."""
        (self._blobs / sha256).unlink(missing_ok=True)

    def publish_adapter(self, source: Path) -> PublishedAdapter:
        """Store an artifact directory; see `ArtifactStore`."""
        manifest = read_manifest(source)
        verify_files(source, manifest)
        size = sum(file.bytes for file in manifest.files)
        published = PublishedAdapter(manifest.digest, size, manifest)
        target = self._adapters / manifest.digest
        if target.is_dir():
            return published

        aside = self._tmp / new_id("adapter")
        aside.mkdir()
        try:
            for name in [*(file.path for file in manifest.files), "manifest.json"]:
                _copy_synced(source / name, aside / name)
            _sync_directory(aside)
            try:
                aside.rename(target)
            except OSError:
                # Another publisher of the same content was first; its directory is as good as ours.
                if not target.is_dir():
                    raise
            _sync_directory(self._adapters)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return published

    def adapter_path(self, digest: str) -> Path:
        """Return the directory of an adapter; see `ArtifactStore`."""
        path = self._adapters / digest
        if not path.is_dir():
            raise NotFound(f"no stored adapter {digest[:12]}…", code="adapter_files_missing")
        return path

    def has_adapter(self, digest: str) -> bool:
        """Tell whether an adapter is published."""
        return (self._adapters / digest).is_dir()

    def delete_adapter(self, digest: str) -> None:
        """Remove an adapter; see `ArtifactStore`."""
        doomed = self._tmp / new_id("deleted")
        try:
            # Renamed first: a reader never meets a half-deleted directory.
            (self._adapters / digest).rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)


def _copy_synced(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing, 1024 * 1024)
        writing.flush()
        os.fsync(writing.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
