"""The engine's process, see `benchmarks.engine_run`, from the outside; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.line_process import LineProcess, line_process
from benchmarks.serving.client import Answer, Ask


class EngineProcess:
    """A side without HTTP; see `benchmarks.serving.works.Side`.

    Args:
        process: Just started.
    """

    name = "our engine alone"

    def __init__(self, process: LineProcess) -> None:
        self._process = process
        self._process.read()

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer all of them at once."""
        message = [[ask.adapter, ask.prompt.messages, ask.new_tokens] for ask in asks]
        return [Answer(**members) for members in self._process.ask(message)]


@contextmanager
def engine_process(model_dir: Path, adapters: Sequence[Path]) -> Iterator[EngineProcess]:
    """Run the process; it loads these adapters when they are asked for."""
    with line_process("benchmarks.engine_run", model_dir, *adapters) as process:
        yield EngineProcess(process)
