"""The decoder's process, see `benchmarks.decoder_run`, from the outside; imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.line_process import LineProcess, line_process


@dataclass(frozen=True)
class Sizes:
    """How large the parts of a model are.

    Attributes:
        precision: How its weights are kept.
        layers: How many.
        layer_weights: Numbers in one layer.
        head_weights: Numbers in the product with the vocabulary.
        adapter_bytes: What one adapter takes.
    """

    precision: str
    layers: int
    layer_weights: int
    head_weights: int
    adapter_bytes: int

    @property
    def bytes_per_weight(self) -> int:
        """What a number of the base model takes."""
        return 4 if self.precision == "float32" else 2


class DecoderProcess:
    """Sends batches to the process.

    Args:
        process: Just started.

    Attributes:
        sizes: What it says of its model.
    """

    def __init__(self, process: LineProcess) -> None:
        self._process = process
        self.sizes = Sizes(**process.read())

    def step_ms(
        self,
        adapters: Sequence[int | None],
        *,
        prompt_tokens: int = 45,
        steps: int = 48,
        one_layer: bool = False,
    ) -> float:
        """Return the milliseconds of the median step.

        Args:
            adapters: Number of each row's adapter; `None` is the base model.
            prompt_tokens: Before the first step, in each row.
            steps: How many.
            one_layer: Compute with the first layer and the head only.
        """
        message = {"adapters": list(adapters), "prompt_tokens": prompt_tokens, "steps": steps}
        return float(statistics.median(self._process.ask({**message, "one_layer": one_layer})))


@contextmanager
def decoder_process(model_dir: Path, adapters: Sequence[Path]) -> Iterator[DecoderProcess]:
    """Run the process with these adapters in memory."""
    with line_process("benchmarks.decoder_run", model_dir, *adapters) as process:
        yield DecoderProcess(process)
