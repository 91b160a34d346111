"""A server program: started, waited for and ended."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.reaper import Reaper

_READY_SECONDS = 240.0


@contextmanager
def running(
    argv: Sequence[str], url: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server until the block ends; enter the block once `/health` answers.

    It ends with this process, too, however that ends.

    Raises:
        RuntimeError: It ended or did not answer in time; the end of its log is in the message.
    """
    reaper = Reaper()
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        reaper.register(process.pid)
        deadline = time.monotonic() + _READY_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} does not answer:\n{log.read_text()[-5000:]}")
            time.sleep(0.2)
        yield
    finally:
        reaper.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status) == 200
    except (OSError, urllib.error.URLError):
        return False
