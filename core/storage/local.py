"""Artifacts in a directory: of this machine, or of a file system that machines share.

Written aside, synced, then renamed, so that a reader sees all of an object or nothing. What is
written aside lies below the same root, because a rename works within one file system only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from core import failpoints
from core.artifacts import MANIFEST_FILE, read_manifest, verify_files
from core.errors import NotFound
from core.ids import new_id
from core.storage.disk import copy_synced, disk_errors, sync_directory, write_hashed
from core.storage.store import Blob, PublishedAdapter, StoredObject


class LocalStore:
    """An artifact store in a directory; see `ArtifactStore`.

    Args:
        root: `blobs/`, `adapters/` and `tmp/` are made below it.
    """

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._adapters = root / "adapters"
        self._tmp = root / "tmp"
        with disk_errors():
            for directory in (self._blobs, self._adapters, self._tmp):
                directory.mkdir(parents=True, exist_ok=True)

    def write_blob(self, chunks: Iterable[bytes], max_bytes: int) -> Blob:
        """Store a stream of bytes; see `ArtifactStore`."""
        temporary = self._tmp / new_id("blob")
        try:
            with disk_errors():
                blob = write_hashed(temporary, chunks, max_bytes)
                temporary.replace(self._blobs / blob.sha256)
                sync_directory(self._blobs)
        finally:
            temporary.unlink(missing_ok=True)
        return blob

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
        with suppress(FileNotFoundError):
            # Stored again: its age counts from now, for those who remove what is old and unused.
            os.utime(target)
            return published

        aside = self._tmp / new_id("adapter")
        try:
            with disk_errors():
                aside.mkdir()
                self._fill(aside, source, [file.path for file in manifest.files])
                try:
                    aside.rename(target)
                except OSError:
                    # Another publisher of the same content was first; its directory is as good.
                    if not target.is_dir():
                        raise
                sync_directory(self._adapters)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return published

    def adapter_path(self, digest: str) -> Path:
        """Return the directory of an adapter; see `ArtifactStore`."""
        path = self._adapters / digest
        if not path.is_dir():
            raise NotFound(f"no stored adapter {digest[:12]}…", code="adapter_files_missing")
        return path

    def open_adapter(self, digest: str) -> dict[str, BinaryIO]:
        """Open the files of an adapter; see `ArtifactStore`."""
        directory = self.adapter_path(digest)
        with ExitStack() as stack:
            try:
                # All at once: from then on a deletion cannot change what is read.
                files: dict[str, BinaryIO] = {
                    name: stack.enter_context((directory / name).open("rb"))
                    for name in sorted(os.listdir(directory))
                }
            except FileNotFoundError as error:
                raise NotFound(
                    "the adapter's files are gone", code="adapter_files_missing"
                ) from error
            stack.pop_all()
        return files

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

    def list_blobs(self) -> Iterator[StoredObject]:
        """Yield all stored blobs."""
        return self._entries(self._blobs)

    def list_adapters(self) -> Iterator[StoredObject]:
        """Yield all published adapters."""
        return self._entries(self._adapters)

    def list_temporary(self) -> Iterator[StoredObject]:
        """Yield what is being written, or was; see `ArtifactStore`."""
        return self._entries(self._tmp)

    def delete_temporary(self, name: str) -> None:
        """Remove a leftover; see `ArtifactStore`."""
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"{name!r} names no leftover")
        path = self._tmp / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Write a small file; see `ArtifactStore`."""
        with disk_errors(), tempfile.TemporaryFile(dir=self._tmp) as file:
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())

    def _entries(self, directory: Path) -> Iterator[StoredObject]:
        now = self._now()
        for path in sorted(directory.iterdir()):
            try:
                size, newest = _measure(path)
            except FileNotFoundError:
                continue
            yield StoredObject(path.name, size, max(0.0, now - newest))

    def _now(self) -> float:
        """Return the time by the clock that dates files: a file server's may differ from ours."""
        with disk_errors(), tempfile.TemporaryFile(dir=self._tmp) as file:
            file.write(b"0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime

    def _fill(self, aside: Path, source: Path, names: list[str]) -> None:
        for number, name in enumerate([*names, MANIFEST_FILE]):
            copy_synced(source / name, aside / name)
            if number == 0:
                failpoints.reached("artifact.upload")
        sync_directory(aside)


def _measure(path: Path) -> tuple[int, float]:
    """Return the bytes of a file or tree, and when anything in it was last written."""
    found = path.stat()
    size, newest = (0 if path.is_dir() else found.st_size), found.st_mtime
    for below in path.rglob("*") if path.is_dir() else ():
        inner = below.stat()
        newest = max(newest, inner.st_mtime)
        size += inner.st_size if below.is_file() else 0
    return size, newest
