"""The side of transformers + PEFT, in a process of its own: see `benchmarks.reference_run`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.line_process import LineProcess, line_process
from benchmarks.serving.client import Answer, Ask


class ReferenceSide:
    """Drives the process.

    Args:
        process: Just started.
    """

    name = "transformers + PEFT, float32, static batch"

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Compute one batch; its rows get their tokens at the same times."""
        sent = time.monotonic()
        times = self._process.ask(
            {
                "rows": [ask.prompt.token_ids for ask in asks],
                "adapters": [ask.adapter for ask in asks],
                "new_tokens": asks[0].new_tokens,
            }
        )
        return [Answer(sent, times, ask.new_tokens, len(ask.prompt.token_ids)) for ask in asks]

    def load_ms(self, adapter: int) -> float:
        """Return the milliseconds that PEFT takes to load an adapter from disk."""
        return float(self._process.ask({"load": adapter})[0])


@contextmanager
def reference_side(model_dir: Path, adapters: Sequence[Path]) -> Iterator[ReferenceSide]:
    """Run the process with these adapters loaded."""
    offline = {"HF_HUB_OFFLINE": "1"}
    with line_process(
        "benchmarks.reference_run", model_dir, *adapters, environment=offline
    ) as process:
        yield ReferenceSide(process)
