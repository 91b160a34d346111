"""Ends foreign servers when the process that started them is gone, however it ended.

The service's own processes watch their parent themselves; Postgres and Redis do not. Run as
`python -m tests.support.reaper`, which reads process ids and directories from stdin until that
closes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

_REPOSITORY = Path(__file__).resolve().parents[2]
_GRACE_SECONDS = 5.0


class Reaper:
    """A process that outlives this one for a moment and takes registered processes along."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.reaper"],
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            # A Ctrl-C is for the process that started it.
            start_new_session=True,
        )

    def register(self, pid: int) -> None:
        """End this process together with the one that calls this."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pid}\n".encode())
        self._process.stdin.flush()

    def own(self, directory: Path) -> None:
        """Remove this directory when the process that calls this is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{directory}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        """End what is registered and still runs, and then the reaper."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_GRACE_SECONDS * 3)


def _main() -> None:
    registered: list[psutil.Process] = []
    directories: list[Path] = []
    for line in sys.stdin:
        if not line.strip().isdecimal():
            directories.append(Path(line.strip()))
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            # It remembers when the process began: another one with the same id is left alone.
            registered.append(psutil.Process(int(line)))
    processes: list[psutil.Process] = []
    for process in registered:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += [*process.children(recursive=True), process]
            process.resume()
            # Postgres takes it as a fast shutdown; SIGTERM would wait for its clients.
            process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_GRACE_SECONDS)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _main()
