"""A real worker process whose child is a small program of `tests.support.children`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from core.config import Settings
from tests.support.children import child_argv, environment
from tests.support.polling import wait_until


class WorkerProcess:
    """A worker in a process group of its own, in an empty working directory.

    Args:
        queue: `train` or `light`.
        mode: Of the child program.
        settings: Given to it by the environment.
        cwd: Its working directory, made if missing.
    """

    def __init__(self, queue: str, mode: str, settings: Settings, cwd: Path) -> None:
        cwd.mkdir(exist_ok=True)
        self.log = cwd.parent / f"{cwd.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                worker_argv(queue, mode),
                cwd=cwd,
                env={**environment(), **settings.environment(), "TUNESMITH_LIFELINE": "stdin"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until Celery listens."""
        wait_until(lambda: " ready." in self.log.read_text(), 30, self.log.read_text)

    def child(self) -> psutil.Process:
        """Return the worker's child, once there is one."""
        parent = psutil.Process(self.process.pid)
        wait_until(lambda: parent.children(), 20, self.log.read_text)
        return parent.children()[0]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal the worker and return its exit code and what it printed."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output.decode()

    def close(self) -> None:
        """Kill the worker if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def worker_argv(queue: str, mode: str) -> list[str]:
    """Return the command line of a worker that prints its model libraries when it ends."""
    program = (
        "import sys\n"
        "from core.config import Settings\n"
        "from worker.app import run\n"
        "queue, *child = sys.argv[1:]\n"
        "code = run(queue, Settings(), child)\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    return [sys.executable, "-c", program, queue, *child_argv(mode)]
