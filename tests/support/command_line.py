"""Commands run in this process, and the API that they speak to, on a port of its own."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from core.config import Settings
from core.inference.engine import Engine
from core.logging import configure
from core.queue import NullQueue
from service.app import create_app
from service.cli import main
from service.serving import find_port, url_of
from tests.support.polling import wait_until


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """What it printed on stdout, which must be JSON and nothing else."""
        return json.loads(self.stdout)


def tunesmith(*arguments: object, stdin: str = "") -> Outcome:
    """Run a command to its end."""
    stdout, stderr = io.StringIO(), io.StringIO()
    given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    code = 0
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdin = given
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def succeed(*arguments: object, stdin: str = "") -> Outcome:
    """Run a command that must succeed."""
    outcome = tunesmith(*arguments, stdin=stdin)
    assert outcome.code == 0, outcome
    return outcome


@contextlib.contextmanager
def live_api(settings: Settings, engine: Engine) -> Iterator[str]:
    """Serve the API from a thread; yields its URL. Workers are woken by nobody."""
    configure(settings, "api")
    port = find_port("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, engine=engine, queue=NullQueue()),
            host="127.0.0.1",
            port=port,
            log_config=None,
            ws="none",
            timeout_graceful_shutdown=2,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 20, "the API did not start")
        yield url_of("127.0.0.1", port)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
