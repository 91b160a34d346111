"""A worker's clock that is wrong, and can jump while the worker runs."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from tests.support.service_client import REPOSITORY

_SHIFTED_CLOCK = Path(__file__).parent / "shifted_clock"
_JUMPS = (0.0, 3600.0, -3600.0)


class Clock:
    """How far the wall clock of some processes is off; see `shifted_clock/sitecustomize.py`.

    Args:
        path: A file of its own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(struct.pack("<d", 0.0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)
        self.offset_seconds = 0.0

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that lives by this clock."""
        return {
            "TUNESMITH_TEST_CLOCK": str(self._path),
            "PYTHONPATH": f"{_SHIFTED_CLOCK}:{REPOSITORY}",
        }

    def jump(self, fraction: float) -> None:
        """Go an hour ahead, an hour behind or back to the truth; never stay."""
        others = [jump for jump in _JUMPS if jump != self.offset_seconds]
        self.offset_seconds = others[int(fraction * len(others))]
        self._memory[:] = struct.pack("<d", self.offset_seconds)
