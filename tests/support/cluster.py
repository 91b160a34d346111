"""The service as a cluster: Postgres, Redis, and each of its parts a command of its own.

Every part is a process that can be killed, stopped, continued and started again; all of them listen
on loopback only, log to files, and end with the process that started them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import httpx2
import psutil

from core.config import Settings
from core.db.session import Database
from core.lifeline import LIFELINE_VARIABLE
from tests.support.polling import wait_until
from tests.support.processes import is_gone
from tests.support.reaper import Reaper
from tests.support.servers import Postgres, Redis, free_port
from tests.support.service_client import REPOSITORY, ServiceClient

_READY_SECONDS = 120.0
_STOP_SECONDS = 40.0
# Every process of a cluster inherits it, so that none can hide.
_MARK_VARIABLE = "TUNESMITH_TEST_CLUSTER"
_SETTINGS_WITHOUT_PREFIX = {"DATABASE_URL", "BROKER_URL", "ENGINE_URLS", "ARTIFACT_URL"}


class Part:
    """One command of the service and the process that runs it.

    Args:
        name: Such as `train-1`; names the log.
        argv: The command.
        environment: All of its variables.
        log: Its output is appended here.
    """

    def __init__(
        self, name: str, argv: list[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.argv = argv
        self.environment = dict(environment)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Id of the last process."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended; a stopped one has not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process unless it runs."""
        if self.running:
            return
        self._close_pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv,
                cwd=REPOSITORY,
                env={**self.environment, LIFELINE_VARIABLE: "stdin"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone; SIGSTOP and SIGCONT included."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the process and wait for its end; its children end by themselves."""
        self.send(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Ask the process to end and return its exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = _STOP_SECONDS) -> int:
        """Wait for the end of the process and return its exit code."""
        assert self._process is not None
        code = self._process.wait(seconds)
        self._close_pipe()
        return code

    def children(self) -> list[psutil.Process]:
        """Return the processes below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def tail(self, characters: int = 3000) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


class Cluster(ServiceClient):
    """Postgres, Redis and the parts of the service, named `api`, `engine`, `train-1`, `light-1` ….

    Nothing of the service runs before `start`. Use it as a context manager.

    Args:
        root: A directory of its own, for data and logs.
        train_workers: How many.
        light_workers: How many.
        environment: Further variables of all parts.
        part_environment: Further variables of one part, by name.
        separate_nodes: Give every worker a data directory of its own, as on machines of their own;
            `TUNESMITH_ARTIFACT_URL` must then name a store that all share.
        disk: Where data directories lie; `root` by default.
    """

    def __init__(
        self,
        root: Path,
        *,
        train_workers: int = 1,
        light_workers: int = 1,
        environment: Mapping[str, str] | None = None,
        part_environment: Mapping[str, Mapping[str, str]] | None = None,
        separate_nodes: bool = False,
        disk: Path | None = None,
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        disk = disk or root
        self.data_dir = disk / "data"
        self._mark = secrets.token_hex(8)
        self._reaper = Reaper()
        try:
            self.postgres = Postgres(self._reaper)
            self.redis = Redis(self._reaper)
        except BaseException:
            self._reaper.close()
            raise
        port, engine_port = free_port(), free_port()
        self.environment = {
            **_foreign_variables(),
            _MARK_VARIABLE: self._mark,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TUNESMITH_DATA_DIR": str(self.data_dir),
            "TUNESMITH_DATABASE_URL": self.postgres.url,
            "TUNESMITH_BROKER_URL": self.redis.url,
            "TUNESMITH_ENGINE_URLS": f"http://127.0.0.1:{engine_port}",
            "TUNESMITH_ENGINE_SECRET": secrets.token_hex(16),
            "TUNESMITH_ENGINE_THREADS": "1",
            "TUNESMITH_TRAINER_THREADS": "1",
            **(environment or {}),
        }
        tunesmith = [sys.executable, "-m", "service.cli"]
        commands = {
            "engine": [
                *(sys.executable, "-m", "engine"),
                *("--listen", f"http://127.0.0.1:{engine_port}"),
            ],
            "api": [*tunesmith, "api", "--port", str(port)],
        }
        for queue, count in (("train", train_workers), ("light", light_workers)):
            for number in range(1, count + 1):
                commands[f"{queue}-{number}"] = [*tunesmith, "worker", "--queue", queue]
        self.parts: dict[str, Part] = {}
        for name, argv in commands.items():
            variables = {**self.environment, **(part_environment or {}).get(name, {})}
            if separate_nodes and name not in ("api", "engine"):
                variables["TUNESMITH_DATA_DIR"] = str(disk / "nodes" / name)
            self.parts[name] = Part(name, argv, variables, root / f"{name}.log")
        self.client = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> Settings:
        """Where database, broker and store are, as the processes see it."""
        return Settings(
            data_dir=self.data_dir,
            database_url=self.postgres.url,
            broker_url=self.redis.url,
            artifact_url=self.environment.get("TUNESMITH_ARTIFACT_URL", ""),
        )

    @property
    def workers(self) -> list[Part]:
        """The worker parts."""
        return [part for name, part in self.parts.items() if name not in ("api", "engine")]

    def prepare(self, models: Mapping[str, Path]) -> None:
        """Create the schema and configure base models: name → directory."""
        self.run("db", "upgrade")
        for name, path in models.items():
            self.run("models", "add", name, str(path))

    def start(self, *names: str) -> None:
        """Start these parts, by default all, and wait until the service says that it is ready."""
        for name in names or self.parts:
            self.parts[name].start()
        if not names:
            self.wait_until_ready()

    def is_ready(self) -> bool:
        """Ask the API whether the service is ready."""
        with contextlib.suppress(httpx2.TransportError):
            return self.client.get("/readyz").status_code == 200
        return False

    def wait_until_ready(self, seconds: float = _READY_SECONDS) -> None:
        """Wait until the service says that it is ready."""

        def check() -> bool:
            ended = [part.name for part in self.parts.values() if not part.running]
            assert not ended, f"{ended} ended\n{self.tails(*ended)}"
            return self.is_ready()

        wait_until(check, seconds, lambda: f"not ready\n{self.readiness()}\n{self.tails()}")

    def readiness(self) -> str:
        """Return what the API says about the parts, or why it cannot."""
        try:
            return self.client.get("/readyz").text
        except httpx2.TransportError as error:
            return repr(error)

    def tails(self, *names: str) -> str:
        """Return the ends of the logs of these parts, by default of all."""
        return "\n".join(f"== {name}\n{self.parts[name].tail()}" for name in names or self.parts)

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """Open the database itself, to see what is really there."""
        database = Database(self.postgres.url)
        try:
            yield database
        finally:
            database.close()

    def processes(self) -> list[psutil.Process]:
        """Return all live processes of the service, also those that lost their parent."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marked = process.environ().get(_MARK_VARIABLE) == self._mark
                if marked and not is_gone(process):
                    found.append(process)
        return found

    def stop(self) -> dict[str, int]:
        """Stop all parts cleanly, workers first; return the exit codes."""
        codes: dict[str, int] = {}
        for parts in (self.workers, [self.parts["api"]], [self.parts["engine"]]):
            running = [part for part in parts if part.running]
            for part in running:
                part.send(signal.SIGTERM)
            codes |= {part.name: part.wait() for part in running}
        return codes

    def close(self) -> None:
        """Kill everything that is left and remove the servers' data."""
        self.client.close()
        for part in self.parts.values():
            if part.running:
                part.kill()
        try:
            left = self.processes()
            psutil.wait_procs(left, timeout=5)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.postgres.close()
            self.redis.close()
        finally:
            self._reaper.close()


def _foreign_variables() -> dict[str, str]:
    """Return the variables of this process without settings of the service."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TUNESMITH_") and name not in _SETTINGS_WITHOUT_PREFIX
    }
