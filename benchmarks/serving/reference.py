"""The side of transformers + PEFT, in a process of its own: see `benchmarks.reference_run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.client import Answer, Ask


class ReferenceSide:
    """Drives the process.

    Args:
        process: With pipes.
    """

    name = "transformers + PEFT, float32, static batch"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Compute one batch; its rows get their tokens at the same times."""
        sent = time.monotonic()
        times = self._call(
            {
                "rows": [ask.prompt.token_ids for ask in asks],
                "adapters": [ask.adapter for ask in asks],
                "new_tokens": asks[0].new_tokens,
            }
        )
        return [Answer(sent, times, ask.new_tokens, len(ask.prompt.token_ids)) for ask in asks]

    def load_ms(self, adapter: int) -> float:
        """Return the milliseconds that PEFT takes to load an adapter from disk."""
        return float(self._call({"load": adapter})[0])

    def _call(self, message: dict[str, Any]) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer: list[float] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def reference_side(model_dir: Path, adapters: Sequence[Path]) -> Iterator[ReferenceSide]:
    """Run the process with these adapters loaded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.reference_run", str(model_dir), *map(str, adapters)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    try:
        yield ReferenceSide(process)
    finally:
        process.communicate()
