"""Generation over HTTP, beside transformers + PEFT in the same run; its parts also run alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks.report import Measurement
from benchmarks.serving import alone, arrivals, bank, first_token, interference, works
from benchmarks.serving.bench import Bench

PARTS: Final[Mapping[str, Callable[[Bench], list[Measurement]]]] = {
    "rows": works.measure_rows,
    "alone": alone.measure,
    "prompts": works.measure_prompts,
    "context": works.measure_contexts,
    "first-token": first_token.measure,
    "bank": bank.measure,
    "arrivals": arrivals.measure,
    "status": interference.measure_status,
    "long-prompt": interference.measure_long_prompt,
}


def measure(part: str, model_dir: Path, rounds: int) -> list[Measurement]:
    """Run one part."""
    with tempfile.TemporaryDirectory() as name:
        return PARTS[part](Bench(Path(name), model_dir, rounds))
