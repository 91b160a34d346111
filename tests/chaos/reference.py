"""Trains specs again where nobody disturbs: what the weights have to be, bit by bit."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.artifacts import read_manifest
from core.inference.engine import BaseModelRef
from worker.child import ChildProcess, Finished
from worker.training import TRAINER_ARGV


def train_undisturbed(
    root: Path,
    specs: Mapping[str, dict[str, Any]],
    bases: Mapping[str, BaseModelRef],
    data_path: Path,
    data_format: str,
    *,
    trainers: int,
) -> dict[str, str]:
    """Train every spec without the service and return the digests of the artifacts.

    Args:
        root: An empty directory.
        specs: Stored specs, by any name.
        bases: Base models by name.
        data_path: The rows of all.
        data_format: Of the rows.
        trainers: How many trainer processes work at the same time.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in specs:
        waiting.put(name)
    digests: dict[str, str] = {}
    failures: list[str] = []

    def work(number: int) -> None:
        child = ChildProcess(
            TRAINER_ARGV,
            log_path=root / f"trainer-{number}.log",
            environment={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        try:
            while not failures:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                task = {
                    "job_id": name,
                    "attempt": 1,
                    "spec": specs[name],
                    "base": bases[specs[name]["base_model"]].model_dump(mode="json"),
                    "sources": [{"path": str(data_path), "format": data_format}],
                    "device": "cpu",
                    "threads": 1,
                    "resume_dir": None,
                    "memory_rung": 0,
                }
                digests[name] = _train(child, task, root / name)
        except Exception as error:
            failures.append(repr(error))
        finally:
            child.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(trainers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return digests


def _train(child: ChildProcess, task: dict[str, Any], work_dir: Path) -> str:
    work_dir.mkdir(parents=True)

    def discard(frame: dict[str, Any]) -> None:
        if frame["event"] == "checkpoint":
            shutil.rmtree(frame["path"])

    outcome = child.run(
        {**task, "work_dir": str(work_dir)},
        on_event=discard,
        stop_reason=lambda: None,
        grace_seconds=1,
    )
    assert isinstance(outcome, Finished), outcome
    digest = read_manifest(Path(outcome.result["artifact_dir"])).digest
    shutil.rmtree(work_dir)
    return digest
