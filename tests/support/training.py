"""A recording monitor and ready-made tasks for tests of the trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.artifacts import describe_files, digest_of
from core.child import Stopped
from core.ids import new_id
from core.training.task import TrainTask
from tests.support.tiny_model import make_tiny_model

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {'the quick ' * (index % 3)}{index}?"},
            {"role": "assistant", "content": f"the fox jumps over {index} dogs" + " and" * index},
        ]
    }
    for index in range(8)
]

# What a measurement says of the machine, not of the training.
_OF_THE_MACHINE = {"tokens_per_second", "memory_bytes"}


class RecordingMonitor:
    """Keeps all events; asks to stop as soon as `stop_when(event, fields)` is true.

    Args:
        stop_when: Judges each event.
        reason: Why it stops.
        keep_dir: Gets a copy of each checkpoint below it, whose own directory is removed as a
            worker does.
    """

    def __init__(
        self,
        stop_when: Callable[[str, dict[str, Any]], bool] | None = None,
        *,
        reason: str = "cancel",
        keep_dir: Path | None = None,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.checkpoints: dict[int, Path] = {}
        self._stop_when = stop_when
        self._reason = reason
        self._keep_dir = keep_dir
        self._stop = False

    @property
    def stop_reason(self) -> str | None:
        return self._reason if self._stop else None

    def send(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})
        if event == "checkpoint" and self._keep_dir is not None:
            kept = self._keep_dir / new_id("checkpoint")
            shutil.copytree(fields["path"], kept)
            shutil.rmtree(fields["path"])
            self.checkpoints[fields["step"]] = kept
        if self._stop_when is not None and self._stop_when(event, fields):
            self._stop = True

    def should_stop(self) -> bool:
        return self._stop

    def check_stop(self) -> None:
        if self._stop:
            raise Stopped

    def metrics(self, name: str) -> list[float]:
        """Return the values of one measurement, in order."""
        values = (e.get(name) for e in self.events if e["event"] == "metric")
        return [value for value in values if value is not None]

    def rows(self, after_step: int = 0) -> list[dict[str, Any]]:
        """Return what was measured after a step, without speed and memory."""
        return [
            {name: value for name, value in e.items() if name not in _OF_THE_MACHINE}
            for e in self.events
            if e["event"] == "metric" and e["step"] > after_step
        ]

    def logged(self, type: str) -> list[dict[str, Any]]:  # noqa: A002
        """Return the data of the events of one type."""
        return [e["data"] for e in self.events if e.get("type") == type]

    def stages(self) -> list[str]:
        """Return the stages that were started."""
        return [e["data"]["stage"] for e in self.events if e.get("type") == "stage_started"]


def base_digest(model_path: Path) -> str:
    """Return a digest that tells two model directories apart."""
    return digest_of(describe_files(model_path, [path.name for path in model_path.iterdir()]))


def make_broken_model(path: Path) -> Path:
    """Save a tiny model that computes no numbers: its last norm is NaN."""
    from safetensors.torch import load_file, save_file

    weights_path = make_tiny_model(path) / "model.safetensors"
    weights = load_file(weights_path)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, weights_path, metadata={"format": "pt"})
    return path


def make_task(
    tmp_path: Path, model_path: Path, rows: list[dict[str, Any]] = ROWS, **spec: Any
) -> TrainTask:
    """Write `rows` below `tmp_path` and return a task on one thread of the CPU.

    Args:
        spec: Members of the JobSpec; without `training` two steps are trained.
    """
    work_dir = tmp_path / new_id("work")
    work_dir.mkdir()
    data_path = tmp_path / new_id("data")
    data_path.write_text("\n".join(json.dumps(row) for row in rows))
    members = {
        "base_model": "tiny",
        "dataset": "file-1",
        "lora": {"r": 4},
        "training": {"max_steps": 2, "learning_rate": 1e-2},
        "evaluation": {"samples": 0},
    } | spec
    return TrainTask.model_validate(
        {
            "job_id": "job-1",
            "attempt": 1,
            "spec": members,
            "base": {"name": "tiny", "digest": base_digest(model_path), "path": str(model_path)},
            "sources": [{"path": data_path}],
            "work_dir": work_dir,
            "device": "cpu",
            "threads": 1,
        }
    )
