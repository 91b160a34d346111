"""One table and one JSON file for a run of benchmarks."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """One figure, ours beside the peer's from the same run.

    Attributes:
        work: What was done.
        unit: Of both figures, such as `tokens/s` or `ms`.
        ours: Samples of ours.
        peer: Samples of the peer's; empty where there is none.
        peer_name: What the peer is.
    """

    work: str
    unit: str
    ours: list[float]
    peer: list[float]
    peer_name: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's, by medians."""
        if not self.peer:
            return None
        return statistics.median(self.ours) / statistics.median(self.peer)


def publish(measurements: Sequence[Measurement], path: Path) -> None:
    """Print a table of medians and write all samples with versions and hardware to `path`."""
    table = Table(title="medians")
    for column in ("work", "ours", "peer", "ratio", "peer is"):
        table.add_column(column)
    for measured in measurements:
        table.add_row(
            measured.work,
            f"{statistics.median(measured.ours):.1f} {measured.unit}",
            f"{statistics.median(measured.peer):.1f} {measured.unit}" if measured.peer else "",
            f"{measured.ratio:.2f}" if measured.ratio else "",
            measured.peer_name,
        )
    Console(width=140).print(table)

    packages = ("tunesmith", "torch", "transformers", "trl", "peft")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "machine": platform.machine(),
                "cores": psutil.cpu_count(logical=False),
                "memory_bytes": psutil.virtual_memory().total,
                "versions": {name: metadata.version(name) for name in packages},
                "measurements": [{**asdict(m), "ratio": m.ratio} for m in measurements],
            },
            indent=2,
        )
        + "\n"
    )
    print(f"All samples: {path}")
