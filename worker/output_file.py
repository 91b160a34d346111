"""The file that a child's output goes to, for the operator of its machine."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from core.logging import get_logger

_MAX_BYTES = 10 * 1024**2

log = get_logger(__name__)


class OutputFile:
    """A log file of bounded size; when it is full it becomes `NAME.1.log` and a new one begins.

    What cannot be written is lost: a full disk must not end what is logged.

    Args:
        path: The file; its directory is made.
        max_bytes: Its size.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._failing = False

    def write(self, data: bytes) -> None:
        """Append bytes."""
        try:
            file = self._open()
            file.write(data)
            if file.tell() > self._max_bytes:
                self.close()
                self._path.replace(self._path.with_suffix(".1.log"))
            self._failing = False
        except OSError as error:
            self.close()
            if not self._failing:
                log.warning("child_output_not_written", path=str(self._path), error=str(error))
            self._failing = True

    def close(self) -> None:
        """Close the file; another write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        return self._file
