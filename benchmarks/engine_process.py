"""The engine's process, see `benchmarks.engine_run`, from the outside; imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.client import Answer, Ask


class EngineProcess:
    """A side without HTTP; see `benchmarks.serving.works.Side`.

    Args:
        process: With pipes, just started.
    """

    name = "our engine alone"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._read()

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer all of them at once."""
        assert self._process.stdin is not None
        message = [[ask.adapter, ask.prompt.messages, ask.new_tokens] for ask in asks]
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return [Answer(**members) for members in self._read()]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def engine_process(model_dir: Path, adapters: Sequence[Path]) -> Iterator[EngineProcess]:
    """Run the process; it loads these adapters when they are asked for."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine_run", str(model_dir), *map(str, adapters)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield EngineProcess(process)
    finally:
        process.communicate()
