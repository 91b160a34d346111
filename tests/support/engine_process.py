"""An engine process of its own, as the service starts it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from core.config import Settings
from core.errors import Unavailable
from core.inference.engine import Engine, EngineStatus
from service.engine_client import RemoteEngine
from service.engine_pool import EnginePool
from tests.support.polling import wait_until

T = TypeVar("T")


class EngineProcess:
    """`python -m engine` with its log in a file.

    Args:
        data_dir: The data directory; the socket is below it.
        listen: Another address than the socket.
        settings: Further settings, by field name.
    """

    def __init__(self, data_dir: Path, *, listen: str | None = None, **settings: object) -> None:
        self.settings = Settings(data_dir=data_dir, engine_threads=1, **settings)  # type: ignore[arg-type]
        self.address = listen or self.settings.engine_addresses[0]
        self.log = data_dir.parent / f"{data_dir.name}-engine.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine", *(["--listen", listen] if listen else [])],
                env={**os.environ, **self.settings.environment(), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def run(self, scenario: Callable[[Engine], Awaitable[T]]) -> T:
        """Run a scenario against a client of the engine."""

        async def main() -> T:
            secret = self.settings.engine_secret.get_secret_value()
            remote = RemoteEngine(self.address, secret=secret, timeout_seconds=60)
            pool = EnginePool({self.address: remote})
            try:
                return await scenario(pool)
            finally:
                await pool.aclose()

        return asyncio.run(main())

    def status(self) -> EngineStatus | None:
        """Return the engine's status, `None` while it does not listen."""
        try:
            return self.run(lambda engine: engine.status())
        except Unavailable:
            return None

    def wait_until_listening(self) -> EngineStatus:
        """Return the first status that the engine gives."""
        found: list[EngineStatus] = []

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            status = self.status()
            found.extend([status] if status else [])
            return bool(found)

        wait_until(answers, 30, "the engine does not listen")
        return found[0]

    def wait_until_ready(self) -> EngineProcess:
        """Return once the engine takes requests."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            status = self.status()
            return status is not None and status.ready

        wait_until(is_ready, 90, lambda: f"the engine is not ready: {self.log.read_text()}")
        return self

    def stop(self) -> int:
        """Stop it politely and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def kill(self) -> None:
        """End it in any case."""
        self.process.kill()
        self.process.wait()
