"""What all parts of the suite share: the model, its adapters, prompts, and how often to measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.adapters import make_adapters
from benchmarks.serving.ours import OurSide, our_side
from benchmarks.serving.prompts import PromptMaker


class Bench:
    """One run of the suite.

    Args:
        root: A directory of its own.
        model_dir: The base model.
        rounds: Samples of each figure.
    """

    def __init__(self, root: Path, model_dir: Path, rounds: int) -> None:
        self.model_dir = model_dir
        self.rounds = rounds
        self.prompts = PromptMaker(model_dir)
        self._root = root
        self._adapters: list[Path] = []
        self._services = 0

    def adapters(self, count: int) -> list[Path]:
        """Return the directories of the first `count` adapters."""
        if len(self._adapters) < count:
            self._adapters += make_adapters(
                self._root / "adapters", self.model_dir, range(len(self._adapters), count)
            )
        return self._adapters[:count]

    @contextmanager
    def ours(
        self, adapters: int, *, precision: str = "auto", **settings: object
    ) -> Iterator[OurSide]:
        """Run a service with this many adapters.

        Args:
            adapters: How many.
            precision: Of the base weights.
            settings: Others, by field name.
        """
        self._services += 1
        variables: Mapping[str, object] = {"engine_precision": precision, **settings}
        with our_side(
            self._root / f"service-{self._services}",
            self.model_dir,
            self.adapters(adapters),
            {f"TUNESMITH_{name.upper()}": str(value) for name, value in variables.items()},
        ) as side:
            yield side

    def log(self, name: str) -> Path:
        """Return where a program writes."""
        return self._root / f"{name}.log"
