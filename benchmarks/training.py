"""A whole epoch of ours beside a plain TRL script, on the same rows and settings.

Each epoch runs in a process of its own, so that peaks of memory can be compared; the runs take
turns, so that whatever else the machine does falls on all. Ours sleeps while it waits for another
thread, as the trainer does for the engine's sake; the plain script waits as torch does by itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Measurement
from worker.child import ChildProcess

_MODES: Final = ("ours", "checkpointing", "plain")
_PEERS: Final = {
    "checkpointing": ("TRL as it comes", "SFTTrainer with its default activation checkpointing"),
    "plain": ("TRL without checkpointing", "SFTTrainer, activation_checkpointing=False"),
}
_WARM_ROWS: Final = 200
_EQUAL_STEPS: Final = 20
_PAIRS = Path(__file__).parents[1] / "examples" / "support_desk" / "train.jsonl"


def measure(model_dir: Path, rounds: int) -> list[Measurement]:
    """Run all measurements of training."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in _MODES}
    for _ in range(rounds):
        for mode, found in runs.items():
            found.append(_epoch(mode, model_dir))
    same_order, at_random = _epoch("losses", model_dir), _epoch("random-order", model_dir)
    speed = {
        mode: [run["tokens"] / run["seconds"] for run in found] for mode, found in runs.items()
    }
    memory = {mode: [run["peak_bytes"] / 2**20 for run in found] for mode, found in runs.items()}
    own = runs["ours"][0]
    pairs = list(zip(own["losses"], same_order["losses"], strict=True))[:_EQUAL_STEPS]
    differences = [abs(loss - other) for loss, other in pairs]
    return [
        *(
            Measurement(f"training, {label}", "tokens/s", speed["ours"], speed[mode], peer)
            for mode, (label, peer) in _PEERS.items()
        ),
        *(
            Measurement(f"peak memory, {label}", "MiB", memory["ours"], memory[mode], peer)
            for mode, (label, peer) in _PEERS.items()
        ),
        Measurement(
            f"largest difference of a loss in {_EQUAL_STEPS} steps",
            "µnat",
            [max(differences) * 1e6],
            [],
            "SFTTrainer on the same batches",
        ),
        Measurement(
            "held-out loss after the epoch",
            "nat",
            [own["held_out_loss"]],
            [at_random["held_out_loss"]],
            "ours in plain random order",
        ),
        Measurement(
            f"warm trainer, task of {_WARM_ROWS} rows to first forward pass",
            "s",
            _warm_starts(model_dir, rounds),
            [],
        ),
    ]


def _epoch(mode: str, model_dir: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_run", mode, str(model_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _warm_starts(model_dir: Path, rounds: int) -> list[float]:
    """Return the seconds from a task's arrival at a trainer that has the model to its first step.

    Finding and claiming a job comes before, see `python -m benchmarks jobs`: some milliseconds.
    """
    lines = _PAIRS.read_text().splitlines()
    with tempfile.TemporaryDirectory() as name:
        data_path = Path(name) / "rows.jsonl"
        data_path.write_text("\n".join((lines * 2)[:_WARM_ROWS]))
        trainer = ChildProcess(
            [sys.executable, "-m", "core.training.process"], log_path=Path(name) / "trainer.log"
        )
        try:
            # The first one loads the model.
            return [
                _first_forward(trainer, model_dir, data_path, Path(name) / f"work-{index}")
                for index in range(rounds + 1)
            ][1:]
        finally:
            trainer.close()


def _first_forward(
    trainer: ChildProcess, model_dir: Path, data_path: Path, work_dir: Path
) -> float:
    work_dir.mkdir()
    reached: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event.get("step") == 0:
            reached.append(time.monotonic())

    started = time.monotonic()
    trainer.run(
        {
            "job_id": "benchmark",
            "attempt": 1,
            "spec": {
                "base_model": "sample",
                "dataset": "sample",
                "training": {"max_steps": 1},
                "evaluation": {"samples": 0},
            },
            "base": {"name": "sample", "digest": "0" * 64, "path": str(model_dir)},
            "sources": [{"path": str(data_path)}],
            "work_dir": str(work_dir),
            "device": "cpu",
        },
        on_event=hear,
        # One step is not waited for.
        stop_reason=lambda: "cancel" if reached else None,
        grace_seconds=60,
    )
    return reached[0] - started
