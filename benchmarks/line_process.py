"""A program of ours in a process of its own, which answers a line of JSON with another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class LineProcess:
    """Talks to the program.

    Args:
        process: With pipes, just started.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, message: Any) -> Any:
        """Send a message and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        """Return what the program says next."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def line_process(
    module: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> Iterator[LineProcess]:
    """Run `python -m MODULE ARGUMENT…`, whose input ends with the block.

    Args:
        module: The program.
        arguments: Of the program.
        environment: Beside this process's own.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        text=True,
    )
    try:
        yield LineProcess(process)
    finally:
        process.communicate()
