"""A real supervisor of small programs, which note in a file what happens to them.

Run as `python -m tests.support.supervised serve DIRECTORY` or `… part KIND NAME DIRECTORY`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from core.lifeline import exit_with_parent
from tests.support.children import REPOSITORY, environment
from tests.support.polling import wait_until


@dataclass(frozen=True)
class Note:
    """Something that happened to a part."""

    name: str
    what: str
    pid: int
    at: float


class RunningSupervisor:
    """A supervisor in a process of its own.

    Args:
        directory: For its lock, its log and the parts' notes.
        parts: (name, kind or command line, stop stage) of each part.
        grace_seconds: Passed on.
        env: Further variables of the parts.
    """

    def __init__(
        self,
        directory: Path,
        parts: Sequence[tuple[str, str | list[str], int]],
        grace_seconds: float = 5,
        env: dict[str, str] | None = None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        specs = [
            {"name": name, "argv": _part_argv(name, kind, directory), "stop_stage": stage}
            for name, kind, stage in parts
        ]
        plan = {"parts": specs, "grace_seconds": grace_seconds}
        (directory / "plan.json").write_text(json.dumps(plan))
        self.log = directory / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.supervised", "serve", str(directory)],
                cwd=REPOSITORY,
                env={**environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def notes(self, what: str | None = None) -> list[Note]:
        """Return what the parts have noted so far."""
        path = self._directory / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        notes = [Note(**json.loads(line)) for line in lines]
        return [note for note in notes if what in (None, note.what)]

    def wait_for_notes(self, what: str, count: int) -> list[Note]:
        """Wait until the parts have noted something this many times."""
        wait_until(
            lambda: len(self.notes(what)) >= count,
            20,
            lambda: f"{self.notes()}\n{self.log.read_text()}",
        )
        return self.notes(what)

    def descendants(self) -> list[psutil.Process]:
        """Return all processes below the supervisor."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        """Kill whatever is left."""
        if self.process.poll() is None:
            for process in self.descendants():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.kill()
        self.process.wait(10)


def _part_argv(name: str, kind: str | list[str], directory: Path) -> list[str]:
    if isinstance(kind, list):
        return kind
    arguments = ["part", kind, name, str(directory)]
    return [sys.executable, "-m", "tests.support.supervised", *arguments]


def _serve(directory: Path) -> int:
    # Imported here, so that the parts start quickly.
    from core.config import Settings
    from core.errors import TunesmithError
    from core.logging import configure
    from service import supervisor

    configure(Settings(), "serve")
    plan: dict[str, Any] = json.loads((directory / "plan.json").read_text())
    supervisor._KILL_MARGIN_SECONDS = 0.3
    running = supervisor.Supervisor(
        [supervisor.ProcessSpec(**part) for part in plan["parts"]],
        lock_path=directory / "run" / "serve.lock",
        grace_seconds=plan["grace_seconds"],
        on_ready=lambda: _note("serve", "ready", directory),
    )
    try:
        return running.run()
    except TunesmithError as error:
        print(error.message, file=sys.stderr)
        return 3


def _part(kind: str, name: str, directory: Path) -> int:
    def stop(_: int, __: object) -> None:
        _note(name, "asked", directory)
        if kind == "stubborn":
            return
        if kind == "slow":
            time.sleep(0.5)
        _note(name, "stopped", directory)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    exit_with_parent(1.0)
    _note(name, "started", directory)
    if kind == "crasher":
        return 7
    if kind == "parent":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        _note(name, "forked", directory)
    while True:
        time.sleep(60)


def _note(name: str, what: str, directory: Path) -> None:
    entry = {"name": name, "what": what, "pid": os.getpid(), "at": time.time()}
    # One write per line: the parts append to the same file.
    with (directory / "notes").open("a") as notes:
        notes.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "serve":
        sys.exit(_serve(Path(arguments[0])))
    sys.exit(_part(arguments[0], arguments[1], Path(arguments[2])))
