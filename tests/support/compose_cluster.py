"""The cluster of docker-compose.yml as processes: commands, variables and secrets are the file's.

Only what containers give is put in its place: addresses, directories, users' own images. Each
process has a data directory of its own; they share Postgres, Redis, an S3 server and base models.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.support import compose
from tests.support.cluster import Part
from tests.support.object_store import running_s3
from tests.support.reaper import Reaper
from tests.support.servers import Postgres, Redis, free_port

_COMMAND_SECONDS = 120


class ComposeCluster:
    """Servers, and any number of the file's services beside each other.

    Args:
        root: A directory of its own.
        dotenv: What the operator has in `.env`.
    """

    def __init__(self, root: Path, dotenv: Mapping[str, str]) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.parts: dict[str, Part] = {}
        self._ports: dict[str, int] = {}
        self._closing = contextlib.ExitStack()
        reaper = Reaper()
        self._closing.callback(reaper.close)
        try:
            self.postgres = Postgres(reaper)
            self._closing.callback(self.postgres.close)
            self.redis = Redis(reaper)
            self._closing.callback(self.redis.close)
            store = self._closing.enter_context(running_s3())
        except BaseException:
            self._closing.close()
            raise
        self._engine_ports = [free_port(), free_port()]
        self._dotenv = {
            "ARTIFACT_URL": store.artifact_url,
            "AWS_ENDPOINT_URL": store.environment["AWS_ENDPOINT_URL"],
            "AWS_DEFAULT_REGION": store.environment["AWS_DEFAULT_REGION"],
            "ENGINE_URLS": ",".join(f"http://127.0.0.1:{port}" for port in self._engine_ports),
            **dotenv,
        }
        self._secrets = root / "secrets"
        self._make_secrets(self.postgres.url, self.redis.url, store.environment)
        self._services: dict[str, dict[str, Any]] = {
            name: service
            for name, service in compose.load(environment=self._dotenv)["services"].items()
            if compose.is_ours(service)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self.parts.values():
            if part.running:
                part.kill()
        self._closing.close()

    def data_dir(self, name: str) -> Path:
        """Return the data directory of a part."""
        return self.root / "nodes" / name

    def url(self, name: str) -> str:
        """Return the base URL of a part that listens."""
        return f"http://127.0.0.1:{self._ports[name]}"

    def run(self, service: str, *arguments: str) -> str:
        """Run a service once, with other arguments than its own if there are any."""
        finished = self._finish(service, service, arguments or self._services[service]["command"])
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def start(self, service: str, number: int = 1) -> Part:
        """Start a service in the background as its own command; replicas differ by number."""
        name = f"{service}-{number}"
        if name not in self.parts:
            if service == "engine":
                self._ports[name] = self._engine_ports[number - 1]
            elif service == "api":
                self._ports[name] = free_port()
            argv = self._argv(name, self._services[service]["command"])
            environment = self._environment(service, name)
            self.parts[name] = Part(name, argv, environment, self.root / f"{name}.log")
        self.parts[name].start()
        return self.parts[name]

    def is_healthy(self, name: str) -> bool:
        """Run the health check that the file has for a part's service."""
        service = name.rpartition("-")[0]
        _, program, *arguments = self._services[service]["healthcheck"]["test"]
        assert program == "tunesmith"
        if service == "api":
            arguments += ["--port", "8000"]
        return self._finish(service, name, arguments).returncode == 0

    def tails(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(f"== {name}\n{part.tail()}" for name, part in self.parts.items())

    def _finish(
        self, service: str, name: str, arguments: list[str] | tuple[str, ...]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._argv(name, list(arguments)),
            cwd=compose.REPOSITORY,
            env=self._environment(service, name),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
        )

    def _argv(self, name: str, arguments: list[str]) -> list[str]:
        port = str(self._ports.get(name, 0))
        placed = []
        for argument in arguments:
            # A container's own network is this machine's loopback here.
            argument = argument.replace("0.0.0.0", "127.0.0.1")
            argument = argument.replace(":9000", f":{port}")
            placed.append(port if argument == "8000" else argument)
        return [sys.executable, "-m", "service.cli", *placed]

    def _environment(self, service: str, name: str) -> dict[str, str]:
        given = {**self._dotenv, **self._services[service]["environment"]}
        placed = {
            variable: value.replace("/run/secrets", str(self._secrets))
            for variable, value in given.items()
        }
        # The image says where data are.
        placed["TUNESMITH_DATA_DIR"] = str(self.data_dir(name))
        return {**_own_variables(), "HOME": str(self.data_dir(name)), **placed}

    def _make_secrets(self, database: str, broker: str, aws: Mapping[str, str]) -> None:
        script = compose.REPOSITORY / "deploy" / "make-secrets.sh"
        subprocess.run(["sh", str(script), str(self._secrets)], check=True, capture_output=True)
        keys = (
            "[default]\n"
            f"aws_access_key_id = {aws['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key = {aws['AWS_SECRET_ACCESS_KEY']}\n"
        )
        for name, content in (
            ("database_url", database),
            ("broker_url", broker),
            ("aws_credentials", keys),
        ):
            (self._secrets / name).chmod(0o600)
            (self._secrets / name).write_text(content + "\n")


def _own_variables() -> dict[str, str]:
    """Return this process's variables without any that the service or its libraries read."""
    ours = ("TUNESMITH_", "AWS_", "DATABASE_URL", "BROKER_URL", "ENGINE_URLS", "ARTIFACT_URL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONPATH": str(compose.REPOSITORY), "OMP_NUM_THREADS": "1"}
