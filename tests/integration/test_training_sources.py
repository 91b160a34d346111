"""Training on several data sets with weights, measured on one of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.artifacts import sha256_file
from core.data.sources import DataSource, SourceRole
from core.training.pipeline import Pipeline
from tests.support.tiny_model import make_tiny_model
from tests.support.training import RecordingMonitor, make_task


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def source(
    path: Path, prompts: str, *, weight: float = 1.0, role: SourceRole = "training"
) -> DataSource:
    rows = [{"q": prompt, "a": "yes"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=path, name=path.name, weight=weight, role=role)


def test_an_epoch_has_rows_by_weight_and_measures_on_the_others(
    tmp_path: Path, model_path: Path
) -> None:
    sources = [
        source(tmp_path / "file-a", "abc", weight=2),
        source(tmp_path / "file-b", "defg", weight=0.5),
        source(tmp_path / "file-c", "xy", role="validation"),
    ]
    task = make_task(
        tmp_path,
        model_path,
        dataset=None,
        datasets=[{"dataset": "file-a", "weight": 2}, {"dataset": "file-b", "weight": 0.5}],
        training={"epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1},
        data={"validation_dataset": "file-c", "columns": {"prompt": "q", "completion": "a"}},
        evaluation={"samples": 2, "max_new_tokens": 2},
    )
    task = task.model_copy(update={"sources": sources})
    monitor = RecordingMonitor()
    result = Pipeline().run(task, monitor)
    report, provenance = result["report"], result["provenance"]
    assert (report["training_rows"], report["validation_rows"]) == (8, 2)
    assert provenance["steps"] == 8
    assert report["eval_loss"] is not None
    assert [sample["prompt"] for sample in report["samples"]] == ["x", "y"]
    assert [(one["dataset"], one["role"], one["weight"]) for one in provenance["sources"]] == [
        ("file-a", "training", 2.0), ("file-b", "training", 0.5), ("file-c", "validation", 1.0),
    ]  # fmt: skip
    assert provenance["sources"][2]["sha256"] == sha256_file(sources[2].path)
    again_dir = tmp_path / "again"
    again_dir.mkdir()
    again = Pipeline().run(task.model_copy(update={"work_dir": again_dir}), RecordingMonitor())
    assert again["report"]["eval_loss"] == report["eval_loss"]
