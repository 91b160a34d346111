"""Trackers of the operator's: what training measures goes to MLflow and TensorBoard, too.

They are written from a thread of their own. One that is away, slow or not installed costs the job
an event and nothing else.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from transformers import TrainerCallback

from core.training.monitor import Monitor
from core.training.task import TrainTask

# Measurements that wait; further ones are dropped.
_MOST_WAITING = 10_000
# How long the end of training waits for what is not written yet, all trackers together.
_CLOSE_SECONDS = 5.0
_EXPERIMENT = "tunesmith"


class _Tracker(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


class TrackingCallback(TrainerCallback):  # type: ignore[misc]
    """Sends measurements to the trackers of a job while its block runs.

    Args:
        task: The job, with the targets of the trackers.
        monitor: Hears of a tracker that fails.
    """

    def __init__(self, task: TrainTask, monitor: Monitor) -> None:
        open_tracker: dict[str, Callable[[TrainTask], _Tracker]] = {
            "mlflow": _MlflowTracker,
            "tensorboard": _TensorBoardTracker,
        }
        self._writers = [
            _Writer(name, task, open_tracker[name], monitor)
            for name in dict.fromkeys(task.spec.training.report_to)
        ]

    def __enter__(self) -> None:
        for writer in self._writers:
            writer.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        for writer in self._writers:
            writer.end(finished=kind is None)
        for writer in self._writers:
            writer.join(deadline)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Pass measurements on."""
        values = {
            name: float(value)
            for name, value in (logs or {}).items()
            if isinstance(value, int | float)
        }
        for writer in self._writers:
            writer.add(state.global_step, values)


class _Writer:
    """Writes to one tracker from a thread, until it fails or training ends."""

    def __init__(
        self,
        name: str,
        task: TrainTask,
        open_tracker: Callable[[TrainTask], _Tracker],
        monitor: Monitor,
    ) -> None:
        self._name = name
        self._task = task
        self._open = open_tracker
        self._monitor = monitor
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | bool] = queue.Queue()
        self._over = threading.Event()
        self._reporting = threading.Lock()
        self._told = False
        self._thread = threading.Thread(target=self._write, name=f"tracker-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, step: int, values: dict[str, float]) -> None:
        if not self._over.is_set() and self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put((step, values))

    def end(self, *, finished: bool) -> None:
        self._waiting.put(finished)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._tell("it did not answer in time")
        # From here on the monitor is another job's.
        with self._reporting:
            self._told = True

    def _write(self) -> None:
        try:
            tracker = self._open(self._task)
            while not isinstance(entry := self._waiting.get(), bool):
                tracker.write(*entry)
            tracker.close(entry)
        except ImportError as error:
            self._tell(
                f"this worker has no package for it: pip install 'tunesmith[{self._name}]'"
                f" ({error})"
            )
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}"[:300])
        finally:
            self._over.set()

    def _tell(self, reason: str) -> None:
        with self._reporting:
            if not self._told:
                self._told = True
                self._monitor.send(
                    "log", type="tracker_failed", data={"tracker": self._name, "reason": reason}
                )


class _TensorBoardTracker:
    def __init__(self, task: TrainTask) -> None:
        if not task.tensorboard_dir:
            raise RuntimeError("this worker has no TUNESMITH_TRACKING_TENSORBOARD_DIR")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(task.tensorboard_dir) / task.job_id))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class _MlflowTracker:
    def __init__(self, task: TrainTask) -> None:
        if not task.mlflow_uri:
            raise RuntimeError("this worker has no TUNESMITH_TRACKING_MLFLOW_URI")
        # A server that is down is given up at once; the defaults try for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=task.mlflow_uri)
        experiment = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(_EXPERIMENT)
        )
        name = f"{task.spec.adapter or task.job_id}-{task.attempt}"
        tags = {"tunesmith.job_id": task.job_id, "tunesmith.attempt": str(task.attempt)}
        run = self._client.create_run(experiment_id, run_name=name, tags=tags)
        self._run_id = run.info.run_id
        params = [
            Param(f"{part}.{member}", str(value))
            for part in ("training", "lora")
            for member, value in getattr(task.spec, part).model_dump(mode="json").items()
        ]
        self._client.log_batch(self._run_id, params=params)

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")
