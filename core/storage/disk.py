"""Files that survive a power cut, and what a disk's refusal is called."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.artifacts import check_size
from core.errors import Unavailable
from core.storage.store import Blob

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BROKEN = {errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT}


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn a disk's refusal into an error of ours; other errors pass.

    Raises:
        Unavailable: Code `storage_full` or `artifact_store_unavailable`.
    """
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "error")
        if error.errno in _FULL:
            raise Unavailable(
                f"the disk for artifacts is full ({name})",
                code="storage_full",
                retry_after_seconds=60,
                hint="Free space where the data directory lies, or have a larger disk there.",
            ) from error
        if error.errno in _BROKEN:
            raise Unavailable(
                f"the directory of artifacts cannot be used ({name})",
                code="artifact_store_unavailable",
                hint="See that the data directory is mounted and may be written to.",
            ) from error
        raise


def write_hashed(target: Path, chunks: Iterable[bytes], max_bytes: int) -> Blob:
    """Write a stream to a new file, wait until it is on the disk, and return hash and size.

    Raises:
        TooLarge: The stream is longer than `max_bytes`.
    """
    hasher, size = hashlib.sha256(), 0
    with target.open("xb") as stream:
        for chunk in chunks:
            size += len(chunk)
            check_size(size, max_bytes, "the upload")
            hasher.update(chunk)
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return Blob(hasher.hexdigest(), size)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file to a new one and wait until it is on the disk."""
    with source.open("rb") as reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing, 1024 * 1024)
        writing.flush()
        os.fsync(writing.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file that is written already is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
