"""What a service costs that nobody uses: processor time and wake-ups of each of its processes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.report import Measurement
from tests.support.service import RunningService

_SETTLE_SECONDS = 10.0
_WATCH_SECONDS = 60.0


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Watch `tunesmith serve` doing nothing, with one base model configured.

    Args:
        model_dir: The base model.
        rounds: Of a minute each.
    """
    percent: dict[str, list[float]] = {}
    switches: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        service = RunningService(Path(name) / "data", {"sample": model_dir})
        try:
            time.sleep(_SETTLE_SECONDS)
            for _ in range(rounds):
                before = {role: _spent(process) for role, process in service.processes().items()}
                time.sleep(_WATCH_SECONDS)
                for role, process in service.processes().items():
                    if role in before:
                        seconds, count = _spent(process)
                        percent.setdefault(role, []).append(
                            100 * (seconds - before[role][0]) / _WATCH_SECONDS
                        )
                        switches.setdefault(role, []).append(
                            (count - before[role][1]) / _WATCH_SECONDS
                        )
        finally:
            service.stop()
    percent["all"] = [sum(figures) for figures in zip(*percent.values(), strict=True)]
    switches["all"] = [sum(figures) for figures in zip(*switches.values(), strict=True)]
    return [
        Measurement(f"idle {role}, {what}", unit, figures[role], [])
        for what, unit, figures in (
            ("processor time", "% of a core", percent),
            ("context switches", "/s", switches),
        )
        for role in figures
    ]


def _spent(process: psutil.Process) -> tuple[float, int]:
    """Return the processor seconds and context switches of all threads so far."""
    times = process.cpu_times()
    tasks = Path(f"/proc/{process.pid}/task")
    if tasks.is_dir():
        switches = sum(_switches(task / "status") for task in tasks.iterdir())
    else:
        counted = process.num_ctx_switches()
        switches = counted.voluntary + counted.involuntary
    return times.user + times.system, switches


def _switches(status: Path) -> int:
    lines = status.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
