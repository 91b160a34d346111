"""Objects of a bucket as files: read piece by piece, without a copy on the disk."""

from __future__ import annotations

import io
from typing import BinaryIO

from core.errors import Conflict
from core.storage.bucket import Bucket

_PIECE_BYTES = 4 * 1024**2


def open_object(bucket: Bucket, name: str, size: int) -> BinaryIO:
    """Return a seekable file over an object; reading it raises what `Bucket.read` raises.

    Args:
        bucket: Holds the object.
        name: Its name.
        size: What it has to have; an object that turns out shorter is refused.
    """
    return io.BufferedReader(_ObjectReader(bucket, name, size), _PIECE_BYTES)


class _ObjectReader(io.RawIOBase):
    """Reads ranges of an object."""

    def __init__(self, bucket: Bucket, name: str, size: int) -> None:
        self._bucket = bucket
        self._name = name
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        content = self._bucket.read(self._name, self._position, end)
        if content is None or len(content) != end - self._position:
            raise Conflict(
                "a stored artifact was damaged or deleted while it was read",
                code="artifact_damaged",
            )
        buffer[: len(content)] = content
        self._position = end
        return len(content)
