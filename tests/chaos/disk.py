"""A disk that can be full: a small file system if one may be mounted, else a limit on files."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import psutil

FULL_DISK_SIGNS = ("storage_full", "No space left on device", "File too large")
"""One of these is in the error of a job that failed for want of disk."""

_FILL_INTERVAL_SECONDS = 0.005


class Disk(Protocol):
    """Where the cluster's data directories and its artifact store lie."""

    description: str

    def full(self, processes: Iterable[psutil.Process]) -> AbstractContextManager[None]:
        """Return a block in which these processes can write nothing more; others may not either."""
        ...

    def close(self) -> None:
        """Remove it."""
        ...


class SmallDisk:
    """A tmpfs of its own, filled to the last byte: writers get a real ENOSPC.

    Args:
        path: An empty directory to mount it on.
        size_bytes: Its size; memory is taken only as far as it is written to.

    Raises:
        CalledProcessError: From the constructor; this process may not mount.
    """

    description = "tmpfs filled to its last byte (ENOSPC)"

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
        subprocess.run(mount, check=True, capture_output=True)

    @contextlib.contextmanager
    def full(self, processes: Iterable[psutil.Process]) -> Iterator[None]:
        """Fill it, and fill again what others free meanwhile; see `Disk`."""
        filler = self._path / "filler"
        over = threading.Event()

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while True:
                    state = os.statvfs(self._path)
                    # Somebody may have been faster.
                    with contextlib.suppress(OSError):
                        if free := state.f_bfree * state.f_frsize:
                            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
                    filled.set()
                    if over.wait(_FILL_INTERVAL_SECONDS):
                        return

        filled = threading.Event()
        thread = threading.Thread(target=fill, name="filler")
        thread.start()
        filled.wait()
        try:
            yield
        finally:
            over.set()
            thread.join()
            filler.unlink()

    def close(self) -> None:
        """Unmount it, with all that is on it."""
        subprocess.run(["umount", "--lazy", str(self._path)], check=True, capture_output=True)


class LimitedFiles:
    """A limit on the size of files (RLIMIT_FSIZE): each write to a file fails, with EFBIG.

    It stands in for a full disk where nothing may be mounted. Only Linux sets limits of others.
    """

    description = "a limit of 0 on the size of files (EFBIG)"

    @contextlib.contextmanager
    def full(self, processes: Iterable[psutil.Process]) -> Iterator[None]:
        """Set the limit, and lift it from children that began meanwhile, too; see `Disk`."""
        limited = list(processes)
        for process in limited:
            _limit(process, 0)
        try:
            yield
        finally:
            for process in limited:
                with contextlib.suppress(psutil.NoSuchProcess):
                    limited = [process, *process.children(recursive=True)]
                    for each in limited:
                        _limit(each, resource.RLIM_INFINITY)

    def close(self) -> None:
        """Do nothing; see `Disk`."""


def open_disk(path: Path, size_bytes: int) -> Disk:
    """Return a small disk mounted on `path` if that is possible here, else the stand-in."""
    path.mkdir()
    try:
        return SmallDisk(path, size_bytes)
    except (OSError, subprocess.CalledProcessError):
        return LimitedFiles()


def _limit(process: psutil.Process, size_bytes: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (size_bytes, hard))
