"""A training that is stopped and goes on elsewhere ends as if nothing had happened."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import safe_globals

from core.artifacts import read_manifest
from core.child import Stopped
from core.errors import TrainingFailed
from core.specs import LAST_RUNG
from core.training.pipeline import Pipeline
from core.training.trainer import AdapterTrainer
from tests.support.tiny_model import make_tiny_model
from tests.support.training import ROWS, RecordingMonitor, make_task
from worker.child import ChildProcess, Finished

# Ten rows to train on and four to validate: three steps an epoch, the last one of a single batch.
FOURTEEN_ROWS = [
    {
        "messages": [
            *row["messages"][:1],
            {"role": "assistant", "content": f"answer {index} the fox"},
        ]
    }
    for index, row in enumerate([*ROWS, *ROWS[:6]])
]
DROPOUT = {"r": 4, "dropout": 0.2}

CASES: dict[str, dict[str, Any]] = {
    "each epoch": {
        "lora": DROPOUT,
        "data": {"validation_fraction": 0.25},
        "training": {
            "epochs": 2.5,
            "learning_rate": 1e-2,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.3,
            "logging_steps": 2,
            "early_stopping_patience": 9,
            "seed": 3,
        },
    },
    "best weights": {
        "lora": DROPOUT,
        "data": {"validation_fraction": 0.25},
        "training": {
            "max_steps": 7,
            "learning_rate": 0.1,
            "lr_scheduler": "constant",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "weight_decay": 0.1,
        },
    },
    "at random": {
        "lora": DROPOUT,
        "data": {"validation_fraction": 0.25, "group_by_length": False},
        "training": {
            "epochs": 2.5,
            "learning_rate": 1e-2,
            "gradient_accumulation_steps": 3,
            "batch_size": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "logging_steps": 2,
        },
    },
    "in order": {
        "lora": DROPOUT,
        "data": {"shuffle": False},
        "training": {"max_steps": 6, "learning_rate": 1e-2, "gradient_accumulation_steps": 3},
    },
    "stopped early": {
        "lora": DROPOUT,
        "data": {"validation_fraction": 0.25},
        "training": {
            "max_steps": 50,
            "learning_rate": 0.05,
            "lr_scheduler": "constant",
            "early_stopping_patience": 2,
            "load_best_model_at_end": True,
        },
    },
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Spare each training the search of all modules that this process has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Return one warm pipeline for all tests, so that a trace left by a stopped job shows."""
    return Pipeline()


def digest_of(result: dict[str, Any]) -> str:
    return read_manifest(Path(result["artifact_dir"])).digest


def disturb() -> None:
    """Leave the random numbers of this process somewhere else."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


def train(
    pipeline: Pipeline,
    tmp_path: Path,
    model_path: Path,
    spec: dict[str, Any],
    monitor: RecordingMonitor,
    **task: Any,
) -> dict[str, Any]:
    """Run one attempt; `task` are further members of the task."""
    disturb()
    request = make_task(tmp_path, model_path, rows=FOURTEEN_ROWS, **spec)
    return pipeline.run(request.model_copy(update=task), monitor)


def train_in_pieces(
    pipeline: Pipeline,
    tmp_path: Path,
    model_path: Path,
    spec: dict[str, Any],
    stop_on: str,
    field: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pause each attempt at its first `stop_on` event with `field` about a step that it did.

    Returns:
        The result and all measurements, in order.
    """
    resume_dir, step = None, 0
    rows: list[dict[str, Any]] = []
    while True:

        def is_enough(event: str, fields: dict[str, Any], start: int = step) -> bool:
            return event == stop_on and field in fields and fields["step"] > start

        monitor = RecordingMonitor(is_enough, reason="pause", keep_dir=tmp_path / "kept")
        try:
            result = train(pipeline, tmp_path, model_path, spec, monitor, resume_dir=resume_dir)
        except Stopped:
            rows += monitor.rows()
            step, resume_dir = monitor.checkpoints.popitem()
        else:
            return result, rows + monitor.rows()


@pytest.mark.parametrize(
    ("name", "stop_on", "field"),
    [
        ("each epoch", "progress", "total_steps"),
        # Just before an evaluation, wherever there is one.
        ("each epoch", "metric", "loss"),
        ("best weights", "metric", "loss"),
        ("at random", "metric", "loss"),
        ("in order", "progress", "total_steps"),
        ("stopped early", "progress", "total_steps"),
        ("stopped early", "metric", "loss"),
    ],
)
def test_a_job_paused_again_and_again_gives_the_same_adapter(
    pipeline: Pipeline, tmp_path: Path, model_path: Path, name: str, stop_on: str, field: str
) -> None:
    spec, undisturbed = CASES[name], RecordingMonitor()
    expected = train(Pipeline(), tmp_path, model_path, spec, undisturbed)
    result, rows = train_in_pieces(pipeline, tmp_path, model_path, spec, stop_on, field)

    assert rows == undisturbed.rows()
    assert digest_of(result) == digest_of(expected)
    for member in ("steps", "best_step", "tokens", "final_loss"):
        assert result["provenance"][member] == expected["provenance"][member]
    for member in ("eval_loss", "base_eval_loss", "train_loss"):
        assert result["report"][member] == expected["report"][member]
    resumed_from = result["provenance"]["resumed_from_steps"]
    if stop_on == "progress":
        assert resumed_from == list(range(1, expected["provenance"]["steps"] + 1))
    else:
        assert len(resumed_from) >= 3


def test_a_pause_amid_the_batches_of_a_step_goes_back_to_its_beginning(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    class PausesAfter(RecordingMonitor):
        """Asks to pause after a step, but not before the next one has begun."""

        step, reads = 7, 0

        @property
        def stop_reason(self) -> str | None:
            last = self.events[-1]
            if last["event"] == "progress" and last.get("step") == self.step:
                self.reads += 1
            # Two callbacks ask at the end of the step itself.
            self._stop = self.reads > 2
            return super().stop_reason

    spec = CASES["each epoch"]
    undisturbed = RecordingMonitor()
    expected = train(pipeline, tmp_path, model_path, spec, undisturbed)
    monitor = PausesAfter(reason="pause", keep_dir=tmp_path / "kept")
    with pytest.raises(Stopped):
        train(pipeline, tmp_path, model_path, spec, monitor)

    # The last step but one: it is not logged, and no evaluation follows it.
    assert list(monitor.checkpoints) == [7]
    assert (monitor.events[-2]["event"], monitor.events[-2]["step"]) == ("progress", 7)
    last = RecordingMonitor()
    result = train(pipeline, tmp_path, model_path, spec, last, resume_dir=monitor.checkpoints[7])
    assert monitor.rows() + last.rows() == undisturbed.rows()
    assert digest_of(result) == digest_of(expected)


def test_any_checkpoint_of_a_killed_trainer_serves_a_fresh_process(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    spec = CASES["each epoch"]
    spec = spec | {"training": spec["training"] | {"save_steps": 1}}
    undisturbed = RecordingMonitor(keep_dir=tmp_path / "kept")
    expected = train(Pipeline(), tmp_path, model_path, spec, undisturbed)

    # The last step ends in an adapter, which needs no checkpoint.
    assert list(undisturbed.checkpoints) == list(range(1, expected["provenance"]["steps"]))
    for step, directory in undisturbed.checkpoints.items():
        monitor = RecordingMonitor()
        result = train(pipeline, tmp_path, model_path, spec, monitor, resume_dir=directory)
        assert monitor.rows() == undisturbed.rows(after_step=step)
        assert digest_of(result) == digest_of(expected)

    request = make_task(tmp_path, model_path, rows=FOURTEEN_ROWS, **spec)
    fresh = ChildProcess(
        [sys.executable, "-m", "core.training.process"],
        log_path=tmp_path / "child.log",
        environment={"OMP_NUM_THREADS": "1"},
    )
    try:
        outcome = fresh.run(
            request.model_copy(update={"resume_dir": directory}).model_dump(mode="json"),
            on_event=lambda frame: None,
            stop_reason=lambda: None,
            grace_seconds=60,
        )
    finally:
        fresh.close()
    assert isinstance(outcome, Finished), outcome
    assert digest_of(outcome.result) == digest_of(expected)


def test_a_checkpoint_names_no_path_and_runs_no_code(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    spec = CASES["best weights"]
    spec = spec | {"training": spec["training"] | {"save_seconds": 1e-9}}
    monitor = RecordingMonitor(keep_dir=tmp_path / "kept")
    train(pipeline, tmp_path, model_path, spec, monitor)

    # By time, after each step but the last.
    assert list(monitor.checkpoints) == [1, 2, 3, 4, 5, 6]
    directory = monitor.checkpoints[5]
    assert {path.name for path in directory.rglob("*")} == {
        "adapter_model.safetensors",
        "best.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "run_state.json",
        "scheduler.pt",
        "trainer_state.json",
    }
    for path in directory.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    with safe_globals():
        for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
            torch.load(directory / name, weights_only=True)


@pytest.mark.parametrize("stage", ["evaluate", "package", "gate"])
def test_a_pause_after_the_last_step_does_not_cost_the_training(
    pipeline: Pipeline, tmp_path: Path, model_path: Path, stage: str
) -> None:
    spec = CASES["best weights"]
    undisturbed = RecordingMonitor()
    expected = train(pipeline, tmp_path, model_path, spec, undisturbed)

    def begins(event: str, fields: dict[str, Any]) -> bool:
        return event == "progress" and fields["stage"] == stage

    monitor = RecordingMonitor(begins, reason="shutdown", keep_dir=tmp_path / "kept")
    if stage == "gate":
        # Nothing slow is left, so the attempt ends as if it had not been asked.
        result = train(pipeline, tmp_path, model_path, spec, monitor)
        assert digest_of(result) == digest_of(expected)
        return
    with pytest.raises(Stopped):
        train(pipeline, tmp_path, model_path, spec, monitor)
    ((step, directory),) = monitor.checkpoints.items()
    assert step == expected["provenance"]["steps"]

    for _ in range(2):
        # Stopped in the same place, it has nothing more to save.
        again = RecordingMonitor(begins, reason="pause", keep_dir=tmp_path / "kept")
        with pytest.raises(Stopped):
            train(pipeline, tmp_path, model_path, spec, again, resume_dir=directory)
        assert not again.checkpoints
        assert not again.rows()

    last = RecordingMonitor()
    result = train(pipeline, tmp_path, model_path, spec, last, resume_dir=directory)
    assert not last.rows()
    assert digest_of(result) == digest_of(expected)
    assert result["report"] == expected["report"]


@pytest.mark.parametrize("reason", ["cancel", "lost"])
def test_a_stop_for_good_saves_nothing(
    pipeline: Pipeline, tmp_path: Path, model_path: Path, reason: str
) -> None:
    for place in ({"step": 2}, {"stage": "evaluate"}):
        monitor = RecordingMonitor(
            lambda event, fields, place=place: place.items() <= fields.items(),
            reason=reason,
            keep_dir=tmp_path / "kept",
        )
        with pytest.raises(Stopped):
            train(pipeline, tmp_path, model_path, CASES["in order"], monitor)
        assert not monitor.checkpoints


def test_a_pause_before_the_first_step_stops_at_once(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    for stage in ("render", "load", "train"):
        monitor = RecordingMonitor(
            lambda event, fields, stage=stage: fields.get("stage") == stage, reason="pause"
        )
        with pytest.raises(Stopped):
            train(pipeline, tmp_path, model_path, CASES["in order"], monitor)
        assert monitor.stages()[-1] == stage
        assert not monitor.metrics("loss")


def test_best_weights_are_selected_and_early_stopping_told(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    monitor = RecordingMonitor()
    result = train(pipeline, tmp_path, model_path, CASES["stopped early"], monitor)
    losses = monitor.metrics("eval_loss")
    evaluated = [row["step"] for row in monitor.rows() if "eval_loss" in row]
    best = losses.index(min(losses))

    # Two evaluations without a better one, and the weights are those of before.
    assert best == len(losses) - 3
    assert monitor.logged("best_selected") == [{"step": evaluated[best], "eval_loss": losses[best]}]
    assert monitor.logged("early_stopped") == [{"step": evaluated[-1], "total_steps": 50}]
    assert result["provenance"]["best_step"] == evaluated[best]
    assert result["provenance"]["steps"] == evaluated[-1]
    assert result["report"]["eval_loss"] == losses[best]

    # Trained just as far, without asking for the best.
    plain = CASES["stopped early"]["training"] | {
        "max_steps": evaluated[best],
        "load_best_model_at_end": False,
    }
    shorter = train(
        pipeline,
        tmp_path,
        model_path,
        CASES["stopped early"] | {"training": plain},
        RecordingMonitor(),
    )
    assert digest_of(shorter) == digest_of(result)


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    spec = CASES["in order"]
    spec = spec | {"training": spec["training"] | {"save_steps": 2}}
    request = make_task(tmp_path, model_path, rows=FOURTEEN_ROWS, **spec)
    in_the_way = request.work_dir / "trainer" / "checkpoint-2"
    in_the_way.parent.mkdir()
    in_the_way.write_text("no directory can be made here")

    monitor = RecordingMonitor(keep_dir=tmp_path / "kept")
    result = pipeline.run(request, monitor)
    (failure,) = monitor.logged("checkpoint_failed")
    assert failure["step"] == 2
    assert "File exists" in failure["reason"]
    assert list(monitor.checkpoints) == [4]
    assert result["provenance"]["steps"] == 6


def test_a_checkpoint_of_another_format_is_refused(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    (tmp_path / "run_state.json").write_text('{"format": 1}')
    with pytest.raises(TrainingFailed) as caught:
        train(
            pipeline,
            tmp_path,
            model_path,
            CASES["in order"],
            RecordingMonitor(),
            resume_dir=tmp_path,
        )
    assert caught.value.code == "checkpoint_unreadable"


def test_a_lower_rung_trains_the_same_steps_with_fewer_rows_at_a_time(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    spec = {
        "lora": {"r": 4},
        "data": {"validation_fraction": 0.25},
        "training": {
            "max_steps": 5,
            "batch_size": 6,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "save_steps": 2,
        },
        "evaluation": {"samples": 2, "max_new_tokens": 2},
    }
    undisturbed = RecordingMonitor(keep_dir=tmp_path / "kept")
    expected = train(pipeline, tmp_path, model_path, spec, undisturbed)
    assert not undisturbed.logged("memory_rung")
    for rung, resume_step, batches, recomputes in (
        (1, None, (3, 2), False),
        (1, 2, (3, 2), False),
        (LAST_RUNG, 4, (1, 6), True),
    ):
        monitor = RecordingMonitor()
        result = train(
            pipeline,
            tmp_path,
            model_path,
            spec,
            monitor,
            resume_dir=undisturbed.checkpoints.get(resume_step),
            memory_rung=rung,
        )
        assert monitor.logged("memory_rung") == [
            {
                "rung": rung,
                "batch_size": batches[0],
                "gradient_accumulation_steps": batches[1],
                "activation_checkpointing": recomputes,
            }
        ]
        rows = undisturbed.rows(after_step=resume_step or 0)
        for row, other in zip(monitor.rows(), rows, strict=True):
            assert row["step"] == other["step"]
            for member in row.keys() & {"loss", "eval_loss", "learning_rate", "grad_norm"}:
                assert row[member] == pytest.approx(other[member], rel=1e-4)
        assert result["provenance"]["tokens"] == expected["provenance"]["tokens"]


def test_a_job_that_ran_out_of_memory_gives_it_up(
    pipeline: Pipeline, tmp_path: Path, model_path: Path
) -> None:
    class Exhausted(RecordingMonitor):
        def send(self, event: str, **fields: Any) -> None:
            if fields.get("step"):
                raise torch.OutOfMemoryError("no more")

    try:
        train(pipeline, tmp_path, model_path, CASES["in order"], Exhausted())
    except torch.OutOfMemoryError:
        # While the error and with it the frames that it came through are still there.
        held = [found for found in gc.get_objects() if isinstance(found, AdapterTrainer)]
    assert not held
