"""A whole service in processes of its own, started and stopped as its users do it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.support.polling import wait_until
from tests.support.service_client import ServiceClient


class RunningService(ServiceClient):
    """`tunesmith serve` on a free loopback port, with its log in a file.

    Args:
        data_dir: The service's data directory.
        models: Name → directory of the base models to configure.
        environment: Further variables, such as a database URL.
    """

    def __init__(
        self,
        data_dir: Path,
        models: dict[str, Path],
        environment: dict[str, str] | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TUNESMITH_ENGINE_THREADS": "1",
            "TUNESMITH_TRAINER_THREADS": "1",
            **(environment or {}),
        }
        self.log = data_dir.parent / f"{data_dir.name}.log"
        for name, path in models.items():
            self.run("models", "add", name, str(path), "--data-dir", str(data_dir))
        self.start()

    def start(self) -> None:
        """Start the supervisor and wait until it says that the service is ready."""
        ready_file = self.data_dir / "run" / "serve.json"
        ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-m", "service.cli", "serve"),
                    *("--data-dir", str(self.data_dir), "--port", "0"),
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

        def is_ready() -> bool:
            assert self.supervisor.poll() is None, self.log.read_text()[-5000:]
            return ready_file.exists()

        try:
            wait_until(is_ready, 90, lambda: "not ready:\n" + self.log.read_text()[-5000:])
        except BaseException:
            self.kill_everything()
            raise
        url = json.loads(ready_file.read_text())["url"]
        self.client = httpx2.Client(base_url=url, timeout=120)

    def processes(self) -> dict[str, psutil.Process]:
        """Return the live processes by role; see `role_of`."""
        roles = {"supervisor": psutil.Process(self.supervisor.pid)}
        for process in roles["supervisor"].children(recursive=True):
            role = role_of(process)
            if role:
                roles[role] = process
        return roles

    def stop(self) -> int:
        """Press Ctrl-C once and return the exit code."""
        self.client.close()
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(signal.SIGINT)
        return self.supervisor.wait(60)

    def kill_everything(self) -> None:
        """End what is left, by id, when a test failed half-way."""
        if hasattr(self, "client"):
            self.client.close()
        if self.supervisor.poll() is None:
            # Its parts notice and end by themselves, as the tests of `serve` show.
            self.supervisor.kill()
            self.supervisor.wait(10)

    def tails(self) -> str:
        """Return the end of the log, which all processes share."""
        return self.log.read_text()[-8000:]


def role_of(process: psutil.Process) -> str | None:
    """Tell which part of the service a process is, by its command line."""
    try:
        arguments = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    marks = {
        "core.training.process": "trainer",
        "core.data.process": "validator",
        "queue train": "train",
        "queue light": "light",
        "-m engine": "engine",
        "service.cli engine": "engine",
        "service.cli api": "api",
    }
    return next((role for mark, role in marks.items() if mark in arguments), None)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Return small chat rows that differ."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is the code of item {number}?"},
                {"role": "assistant", "content": f"The code of item {number} is blue-{number}."},
            ]
        }
        for number in range(count)
    ]
