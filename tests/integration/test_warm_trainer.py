"""A warm trainer is as good as a fresh one: no job leaves a trace or keeps memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from core.artifacts import read_manifest
from core.child import Stopped
from core.errors import TrainingFailed
from core.training.pipeline import Pipeline
from core.training.task import TrainTask
from tests.support.tiny_model import make_tiny_model
from tests.support.training import ROWS, RecordingMonitor, make_broken_model, make_task
from worker.child import ChildProcess, Finished

RATE = 1e-2
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PAIRS = [
    {
        "prompt": f"What is {index}?",
        "chosen": f"the fox jumps over {index} dogs",
        "rejected": f"hello there, {index}",
    }
    for index in range(8)
]
# What comes before job B, each a way in which libraries change a model or the process.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "preferences": {"method": {"type": "dpo"}, "rows": PAIRS},
    "noise": {"training": {"neftune_noise_alpha": 5.0}},
    "recomputing": {"training": {"gradient_checkpointing": True}},
    "half precision": {"lora": {"r": 2, "dtype": "bf16"}, "training": {"optim": "adafactor"}},
    "validation": {
        "data": {"validation_fraction": 0.25},
        "training": {"load_best_model_at_end": True, "eval_steps": 1},
        "evaluation": {"samples": 2, "max_new_tokens": 3},
    },
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def task_of(tmp_path: Path, model_path: Path, kind: str) -> TrainTask:
    spec = dict(KINDS[kind])
    rows = spec.pop("rows", ROWS)
    spec["training"] = {"max_steps": 2, "learning_rate": RATE} | spec.get("training", {})
    return make_task(tmp_path, model_path, rows, **spec)


def job_b(tmp_path: Path, model_path: Path) -> TrainTask:
    return make_task(
        tmp_path,
        model_path,
        training={"max_steps": 3, "learning_rate": RATE, "seed": 5},
        lora={"r": 4, "dropout": 0.1},
    )


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """Return all by which a job could have changed a model or its classes."""
    return {
        "forward": {type(m): type(m).forward for m in model.modules()},
        "modules": {
            name: (
                id(module),
                type(module),
                sorted(vars(module)),
                [list(getattr(module, hooks)) for hooks in HOOKS],
                module.training,
                getattr(module, "gradient_checkpointing", None),
            )
            for name, module in model.named_modules()
        },
        "parameters": {
            name: (id(p), p.dtype, p.requires_grad, p.grad is None, p._version, p.detach().sum())
            for name, p in model.named_parameters()
        },
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "flags": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }


def test_jobs_leave_the_base_as_it_was_loaded(tmp_path: Path, model_path: Path) -> None:
    pipeline = Pipeline()
    pipeline.run(task_of(tmp_path, model_path, "plain"), RecordingMonitor())
    assert pipeline._bases._loaded is not None
    base = pipeline._bases._loaded.model
    before = snapshot(base)
    for kind in KINDS:
        pipeline.run(task_of(tmp_path, model_path, kind), RecordingMonitor())
    with pytest.raises(Stopped):
        pipeline.run(
            task_of(tmp_path, model_path, "noise"),
            RecordingMonitor(lambda event, fields: fields.get("step") == 1),
        )
    assert pipeline._bases._loaded.model is base
    assert snapshot(base) == before


@pytest.mark.long
def test_job_b_is_the_same_in_a_fresh_process_and_memory_does_not_grow(
    tmp_path: Path, model_path: Path
) -> None:
    broken = make_broken_model(tmp_path / "broken")
    with trainer_child(tmp_path / "warm.log") as warm:
        sizes = []
        for kind in islice(cycle(KINDS), 20):
            digest_of(warm, task_of(tmp_path, model_path, kind))
            sizes.append(psutil.Process(warm.pid).memory_info().rss)
        assert sizes[19] <= 1.03 * sizes[4]
        failing = make_task(tmp_path, broken, training={"max_steps": 1, "neftune_noise_alpha": 5.0})
        assert not isinstance(run(warm, failing), Finished)
        after_all = digest_of(warm, job_b(tmp_path, model_path))
    with trainer_child(tmp_path / "fresh.log") as fresh:
        assert digest_of(fresh, job_b(tmp_path, model_path)) == after_all


def test_an_exception_amid_noise_leaves_no_trace(tmp_path: Path, model_path: Path) -> None:
    class Failing(RecordingMonitor):
        def send(self, event: str, **fields: Any) -> None:
            if fields.get("step"):
                raise TrainingFailed("on purpose", code="on_purpose")

    def digest(pipeline: Pipeline) -> str:
        result = pipeline.run(job_b(tmp_path, model_path), RecordingMonitor())
        return read_manifest(Path(result["artifact_dir"])).digest

    pipeline = Pipeline()
    expected = digest(pipeline)
    for kind in ("noise", "recomputing", "preferences"):
        with pytest.raises(TrainingFailed):
            pipeline.run(task_of(tmp_path, model_path, kind), Failing())
        assert digest(pipeline) == expected


@contextmanager
def trainer_child(log_path: Path) -> Iterator[ChildProcess]:
    child = ChildProcess(
        [sys.executable, "-m", "core.training.process"],
        log_path=log_path,
        environment={"OMP_NUM_THREADS": "1"},
    )
    try:
        yield child
    finally:
        child.close()


def run(child: ChildProcess, task: TrainTask) -> Any:
    return child.run(
        task.model_dump(mode="json"),
        on_event=lambda frame: None,
        stop_reason=lambda: None,
        grace_seconds=60,
    )


def digest_of(child: ChildProcess, task: TrainTask) -> str:
    outcome = run(child, task)
    assert isinstance(outcome, Finished), outcome
    return read_manifest(Path(outcome.result["artifact_dir"])).digest
