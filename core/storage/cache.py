"""Copies of remote artifacts on this machine, shared by its processes.

Owns which copies exist and when the longest unused leave. An entry is a directory that appears by
a rename when it is complete, and says how large each of its files must be. Processes agree through
a file lock; within one process, callers who want the same entry wait for one download.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from core.errors import Unavailable
from core.ids import new_id
from core.logging import get_logger
from core.storage.disk import disk_errors, sync_directory, sync_file

Kind = Literal["blobs", "adapters"]

_CONTENT = "content"
_SIZES = "sizes.json"
# Whoever was given a path opens the files within this time; open files survive their removal.
_IN_USE_SECONDS = 900.0
# A download takes no longer; what is older was left by a process that died.
_LEFTOVER_SECONDS = 86_400.0

log = get_logger(__name__)


class ArtifactCache:
    """A directory of copies.

    Args:
        directory: Made with the first entry.
        max_bytes: Beyond this the longest unused copies leave, except those of the last minutes.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._tmp = directory / "tmp"
        self._lock = directory / "lock"
        self._loading: dict[tuple[Kind, str], Future[Path]] = {}
        self._mutex = threading.Lock()

    def find(self, kind: Kind, name: str) -> Path | None:
        """Return the file or directory of a copy, or `None`; a damaged copy is removed."""
        entry = self._directory / kind / name
        if not entry.exists():
            return None
        with self._locked(fcntl.LOCK_SH):
            if _is_whole(entry):
                with suppress(FileNotFoundError):
                    os.utime(entry)
                    return entry / _CONTENT
        with self._locked(fcntl.LOCK_EX):
            # Looked at again: another process may have put a whole copy there.
            if entry.exists() and not _is_whole(entry):
                log.warning("cached_artifact_damaged", kind=kind, name=name)
                self._remove(entry)
        return None

    def fetch(self, kind: Kind, name: str, load: Callable[[Path], None]) -> Path:
        """Return a copy, made by `load` where there is none.

        Args:
            kind: What it is.
            name: Its hash or digest.
            load: Writes the file or directory to the path it is given, once for all callers of
                this process; calls `make_room` when it knows the size. It verifies what it writes.
        """
        found = self.find(kind, name)
        if found is not None:
            return found
        with self._mutex:
            loading = self._loading.get((kind, name))
            mine = loading is None
            if loading is None:
                loading = self._loading[kind, name] = Future()
        if not mine:
            return loading.result()
        try:
            # Another caller may have finished between the look and the lock.
            path = self.find(kind, name) or self._load(kind, name, load)
            loading.set_result(path)
            return path
        except BaseException as error:
            loading.set_exception(error)
            raise
        finally:
            with self._mutex:
                del self._loading[kind, name]

    def adopt(self, kind: Kind, name: str, source: Path) -> None:
        """Make a copy of a complete temporary file, which is moved; a copy there is as good."""
        self.make_room(source.stat().st_size)
        aside = self._new_temporary("entry")
        try:
            with disk_errors():
                aside.mkdir()
                source.rename(aside / _CONTENT)
                self._install(kind, name, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def drop(self, kind: Kind, name: str) -> None:
        """Remove a copy; open files stay readable."""
        if (self._directory / kind / name).exists():
            with self._locked(fcntl.LOCK_EX):
                self._remove(self._directory / kind / name)

    def make_room(self, wanted_bytes: int) -> None:
        """Remove the longest unused copies until so many bytes more fit under the limit."""
        self._evict(self._max_bytes - wanted_bytes)

    @contextmanager
    def temporary_file(self, kind: str) -> Iterator[Path]:
        """Yield a path for a new file beside the copies; what is there afterwards is removed."""
        path = self._new_temporary(kind)
        try:
            with disk_errors():
                yield path
        finally:
            path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Write a small file.

        Raises:
            Unavailable: The disk is full or cannot be written to.
        """
        with disk_errors():
            self._tmp.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._tmp) as file:
                file.write(b"0")
                file.flush()

    def _load(self, kind: Kind, name: str, load: Callable[[Path], None]) -> Path:
        try:
            return self._load_once(kind, name, load)
        except Unavailable as error:
            if error.code != "storage_full":
                raise
        # The limit is larger than the disk: copies that nobody uses are worth less than this one.
        self._evict(0)
        return self._load_once(kind, name, load)

    def _load_once(self, kind: Kind, name: str, load: Callable[[Path], None]) -> Path:
        aside = self._new_temporary("entry")
        try:
            with disk_errors():
                aside.mkdir()
                load(aside / _CONTENT)
                return self._install(kind, name, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _install(self, kind: Kind, name: str, aside: Path) -> Path:
        sizes = {}
        for path in _files(aside / _CONTENT):
            sync_file(path)
            sizes[path.relative_to(aside).as_posix()] = path.stat().st_size
        (aside / _SIZES).write_text(json.dumps(sizes))
        sync_file(aside / _SIZES)
        sync_directory(aside)
        entry = self._directory / kind / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.rename(entry)
        except OSError:
            # Another process was first; what it has put there holds the same bytes.
            if not entry.is_dir():
                raise
        return entry / _CONTENT

    def _evict(self, target_bytes: int) -> None:
        with self._locked(fcntl.LOCK_EX):
            # By the clock that dates the entries, whatever that of this process says.
            os.utime(self._lock)
            now = self._lock.stat().st_mtime
            self._remove_leftovers(now)
            entries = []
            for kind in ("blobs", "adapters"):
                for entry in _children(self._directory / kind):
                    with suppress(FileNotFoundError):
                        entries.append((entry.stat().st_mtime, _size(entry), entry))
            total = sum(size for _, size, _ in entries)
            for used, size, entry in sorted(entries):
                if total <= target_bytes or now - used < _IN_USE_SECONDS:
                    return
                self._remove(entry)
                total -= size
                log.info("cached_artifact_evicted", name=entry.name, bytes=size)

    def _remove(self, entry: Path) -> None:
        doomed = self._new_temporary("doomed")
        # Renamed first, so that nobody finds half an entry.
        with suppress(FileNotFoundError):
            entry.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _new_temporary(self, kind: str) -> Path:
        with disk_errors():
            self._tmp.mkdir(parents=True, exist_ok=True)
        return self._tmp / new_id(kind)

    def _remove_leftovers(self, now: float) -> None:
        for path in _children(self._tmp):
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime < _LEFTOVER_SECONDS:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with disk_errors():
            self._directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            # Closing gives the lock back.
            os.close(descriptor)


def _is_whole(entry: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((entry / _SIZES).read_bytes())
        return bool(sizes) and all(
            (entry / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _files(path: Path) -> list[Path]:
    return (
        sorted(below for below in path.rglob("*") if below.is_file()) if path.is_dir() else [path]
    )


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in _files(entry))


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
