from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from core.child import Stopped
from core.training import trackers
from core.training.task import TrainTask
from core.training.trackers import TrackingCallback
from tests.support.api import ROWS, Api, running_api


class Heard:
    """A monitor that keeps what it hears."""

    stop_reason = None

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def check_stop(self) -> None:
        if self.stop_reason:
            raise Stopped


class State:
    global_step = 0


def make_task(tmp_path: Path, *report_to: str, **targets: str) -> TrainTask:
    return TrainTask.model_validate(
        {
            "job_id": "job-1",
            "attempt": 1,
            "spec": {
                "base_model": "tiny",
                "rows": ROWS,
                "training": {"report_to": list(report_to)},
            },
            "base": {"name": "tiny", "digest": "d" * 64, "path": str(tmp_path)},
            "sources": [],
            "work_dir": tmp_path / "work",
            **targets,
        }
    )


def train(task: TrainTask, monitor: Heard) -> None:
    """Log two steps as training does."""
    callback = TrackingCallback(task, monitor)
    with callback:
        for step in (1, 2):
            state = State()
            state.global_step = step
            callback.on_log(None, state, None, logs={"loss": 2.0 / step, "note": "text"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_measurements_of_a_job(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Heard()
    train(make_task(tmp_path, "tensorboard", tensorboard_dir=str(tmp_path / "tb")), monitor)
    assert monitor.events == []
    read = EventAccumulator(str(tmp_path / "tb" / "job-1"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        (1, 2.0),
        (2, 1.0),
    ]


def test_a_tracker_that_cannot_be_written_costs_an_event_and_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    monitor = Heard()
    train(make_task(tmp_path, "tensorboard", tensorboard_dir=str(tmp_path / "file")), monitor)
    assert [(event["type"], event["data"]["tracker"]) for event in monitor.events] == [
        ("tracker_failed", "tensorboard")
    ]


def test_a_worker_without_the_package_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    monitor = Heard()
    train(make_task(tmp_path, "mlflow", mlflow_uri="http://127.0.0.1:9"), monitor)
    assert "tunesmith[mlflow]" in monitor.events[0]["data"]["reason"]


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    class Hanging:
        def __init__(self, task: TrainTask) -> None:
            hanging.wait(60)

    monkeypatch.setattr(trackers, "_TensorBoardTracker", Hanging)
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.2)
    monitor = Heard()
    started = time.monotonic()
    train(make_task(tmp_path, "tensorboard", tensorboard_dir="anywhere"), monitor)
    hanging.set()
    assert time.monotonic() - started < 5
    assert "in time" in monitor.events[0]["data"]["reason"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_the_measurements_and_settings_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    # A new database takes it some seconds.
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 60.0)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monitor = Heard()
    train(make_task(tmp_path, "mlflow", mlflow_uri=uri), monitor)
    assert monitor.events == []
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tunesmith")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["tunesmith.job_id"] == "job-1"
    assert run.data.params["lora.r"]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 2.0),
        (2, 1.0),
    ]


def test_a_spec_may_name_configured_trackers_only(tmp_path: Path) -> None:
    spec = {"base_model": "tiny", "rows": ROWS, "training": {"report_to": ["tensorboard"]}}
    with running_api(tmp_path / "without") as api:
        for path in ("/jobs", "/jobs/validate"):
            answer = api.client.post(path, json=spec)
            assert (answer.status_code, answer.json()["code"]) == (422, "tracker_not_configured")
    api: Api
    with running_api(tmp_path / "with", tracking_tensorboard_dir=str(tmp_path)) as api:
        assert api.client.post("/jobs", json=spec).status_code == 202
