"""One table and one JSON file for a run of benchmarks."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """One figure, ours beside the peer's from the same run.

    Attributes:
        work: What was done.
        unit: Of both figures, such as `tokens/s` or `ms`.
        ours: Samples of ours; those of which there is nothing to tell are missing.
        peer: Samples of the peer's; empty where there is none.
        peer_name: What the peer is, with its precision.
    """

    work: str
    unit: str
    ours: list[float]
    peer: list[float]
    peer_name: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's, by medians."""
        if not self.ours or not self.peer or not statistics.median(self.peer):
            return None
        return statistics.median(self.ours) / statistics.median(self.peer)


def publish(
    parts: Iterable[Sequence[Measurement]], path: Path, versions: Mapping[str, str] | None = None
) -> None:
    """Print a table of medians and write all samples with versions and hardware to `path`.

    Args:
        parts: The measurements in the order of the table. Each part is written as soon as it is
            there, so that it outlives a failure of the next one.
        path: The JSON file.
        versions: Of programs that are not in this environment.
    """
    measurements: list[Measurement] = []
    for part in parts:
        measurements += part
        _write(measurements, path, versions or {})
    _print(measurements)
    print(f"All samples: {path}")


def _print(measurements: Sequence[Measurement]) -> None:
    table = Table(title="medians")
    for column in ("work", "ours", "peer", "ratio", "peer is"):
        table.add_column(column)
    for measured in measurements:
        table.add_row(
            measured.work,
            _median(measured.ours, measured.unit),
            _median(measured.peer, measured.unit),
            f"{measured.ratio:.2f}" if measured.ratio else "",
            measured.peer_name,
        )
    Console(width=150).print(table)


def _median(samples: Sequence[float], unit: str) -> str:
    return f"{statistics.median(samples):.1f} {unit}" if samples else ""


def _write(measurements: Sequence[Measurement], path: Path, versions: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                **_machine(),
                "versions": {**_own_versions(), **versions},
                "measurements": [{**asdict(m), "ratio": m.ratio} for m in measurements],
            },
            indent=2,
        )
        + "\n"
    )


def _own_versions() -> dict[str, str]:
    packages = ("tunesmith", "torch", "transformers", "trl", "peft")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def _machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    """Return the processor's name and the vector instructions that it has, where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
    vectors = [flag for flag in facts.get("flags", "").split() if flag in wanted]
    return " ".join([facts.get("model name", "").strip(), *vectors])
