"""The two children as their parents run them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import read_manifest
from core.training.pipeline import Pipeline
from core.training.task import TrainTask
from tests.support.tiny_model import make_tiny_model
from tests.support.training import RecordingMonitor, make_task
from worker.child import ChildProcess, Failed, Finished, Outcome, Stopped


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def child(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChildProcess]:
    argv = [sys.executable, "-m", request.param]
    process = ChildProcess(
        argv, log_path=tmp_path / "child.log", environment={"OMP_NUM_THREADS": "1"}
    )
    yield process
    process.close()


def run(
    child: ChildProcess,
    task: TrainTask,
    monitor: RecordingMonitor,
    on_output: Callable[[bytes], None] | None = None,
) -> Outcome:
    def on_event(frame: dict[str, Any]) -> None:
        monitor.send(frame.pop("event"), **frame)

    return child.run(
        task.model_dump(mode="json"),
        on_event=on_event,
        stop_reason=lambda: "cancel" if monitor.should_stop() else None,
        grace_seconds=60,
        on_output=on_output,
    )


@pytest.mark.parametrize("child", ["core.training.process"], indirect=True)
def test_the_trainer_stays_warm_through_failure_and_stop(
    child: ChildProcess, tmp_path: Path, model_path: Path
) -> None:
    task = make_task(tmp_path, model_path)
    monitor = RecordingMonitor()
    outcome = run(child, task, monitor)
    assert isinstance(outcome, Finished), outcome
    pid = child.pid
    assert len(monitor.metrics("loss")) == 2

    # The same bits as in this process.
    expected = Pipeline().run(make_task(tmp_path, model_path), RecordingMonitor())
    digest = read_manifest(Path(expected["artifact_dir"])).digest
    assert read_manifest(Path(outcome.result["artifact_dir"])).digest == digest

    bad = make_task(tmp_path, model_path, rows=[{"messages": []}])
    failed = run(child, bad, RecordingMonitor())
    assert isinstance(failed, Failed)
    assert failed.error["code"] == "invalid_dataset"

    endless = make_task(tmp_path, model_path, training={"max_steps": 100_000})
    stopping = RecordingMonitor(lambda event, fields: fields.get("step", 0) >= 2)
    assert run(child, endless, stopping) == Stopped(forced=False)

    again = run(child, make_task(tmp_path, model_path), RecordingMonitor())
    assert isinstance(again, Finished)
    assert read_manifest(Path(again.result["artifact_dir"])).digest == digest
    assert child.pid == pid


@pytest.mark.parametrize("child", ["core.training.process"], indirect=True)
def test_the_trainer_writes_what_it_does_as_json_lines(
    child: ChildProcess, tmp_path: Path, model_path: Path
) -> None:
    def log_of(task: TrainTask, monitor: RecordingMonitor) -> list[dict[str, Any]]:
        written = bytearray()
        run(child, task, monitor, written.extend)
        lines = [json.loads(line) for line in written.splitlines()]
        assert {(line["job_id"], line["attempt"]) for line in lines} == {
            (task.job_id, task.attempt)
        }
        return lines

    task = make_task(tmp_path, model_path)
    lines = log_of(task, RecordingMonitor())
    told = [line["event"] for line in lines]
    assert [line["stage"] for line in lines if line["event"] == "stage_started"] == [
        "render", "load", "train", "evaluate", "package", "gate",
    ]  # fmt: skip
    assert told.count("measured") == 2
    assert told[-1] == "training_done"
    (plan,) = (line for line in lines if line["event"] == "training_planned")
    assert (plan["rows"], plan["dtype"], plan["batch_size"]) == (8, "float32", 2)
    bad = make_task(tmp_path, model_path, rows=[{"messages": []}])
    *_, failed = log_of(bad, RecordingMonitor())
    assert (failed["event"], failed["code"]) == ("training_failed", "invalid_dataset")
    endless = make_task(tmp_path, model_path, training={"max_steps": 100_000})
    stopping = RecordingMonitor(lambda event, fields: fields.get("step", 0) >= 2)
    *_, stopped = log_of(endless, stopping)
    assert (stopped["event"], stopped["reason"]) == ("training_stopped", "cancel")


@pytest.mark.parametrize("child", ["core.data.process"], indirect=True)
def test_the_validator_reports_and_refuses(
    child: ChildProcess, tmp_path: Path, model_path: Path
) -> None:
    task = make_task(tmp_path, model_path, data={"validation_fraction": 0.25})
    outcome = run(child, task, RecordingMonitor())
    assert isinstance(outcome, Finished), outcome
    assert (outcome.result["rows"], outcome.result["steps"]) == (8, 2)
    trained = make_task(tmp_path, model_path, rows=[{"prompt": "a", "completion": ""}])
    failed = run(child, trained, RecordingMonitor())
    assert isinstance(failed, Failed)
    assert (failed.error["code"], failed.error["line"]) == ("invalid_dataset", 1)
