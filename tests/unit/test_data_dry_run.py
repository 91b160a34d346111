from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.dry_run import dry_run
from core.data.split import count_steps, split_rows
from core.errors import InvalidInput
from core.specs import DataSpec, JobSpec, TrainingSpec
from tests.support.tiny_model import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def spec(**members: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "tiny", "dataset": "file-1"} | members)


def write(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def test_the_report_counts_what_training_will_see(tmp_path: Path, tokenizer: Any) -> None:
    rows = [pair("0:", "1" * count) for count in range(1, 11)] + [pair("0:", "1")]
    report = dry_run(
        spec(data={"validation_fraction": 0.2}, training={"epochs": 2}),
        write(tmp_path, rows),
        None,
        tokenizer,
    )
    sample = report.pop("sample")
    assert report == {
        "format": "prompt_completion",
        "rows": 11,
        "dropped": {},
        "training_rows": 9,
        "validation_rows": 2,
        "duplicates": 1,
        "tokens": {"total": 89, "min": 4, "mean": 8.1, "p50": 8, "p95": 13, "max": 13},
        "trained_tokens": 67,
        "steps": 6,
    }
    assert sample == {"line": 1, "text": "0:1<|im_end|>", "spans": [[2, 13]]}


def test_every_bad_row_is_listed_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    rows = [pair("a", "b"), pair("a", "b " * 40), {"prompt": "a"}, pair("a", "c" * 50)]
    with pytest.raises(InvalidInput) as caught:
        dry_run(spec(training={"max_length": 20}), write(tmp_path, rows), None, tokenizer)
    assert caught.value.code == "invalid_dataset"
    found = [(error["line"], error["code"]) for error in caught.value.errors]
    assert found == [(2, "row_too_long"), (3, "missing_field"), (4, "row_too_long")]


def test_the_models_context_limits_rows_too(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [pair("a", "1" * 30)])
    assert dry_run(spec(), path, None, tokenizer, context_length=32)["rows"] == 1
    with pytest.raises(InvalidInput, match="32 tokens and the limit is 31"):
        dry_run(spec(), path, None, tokenizer, context_length=31)


def test_messages_without_a_template_are_refused_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path, [{"messages": turns}] * 2)
    with pytest.raises(InvalidInput) as caught:
        dry_run(spec(), path, None, make_tokenizer(None))
    assert caught.value.code == "no_chat_template"


def test_one_row_cannot_be_split(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [pair("a", "b")])
    with pytest.raises(InvalidInput) as caught:
        dry_run(spec(data={"validation_fraction": 0.1}), path, None, tokenizer)
    assert (caught.value.code, caught.value.field) == ("too_few_rows", "data.validation_fraction")


@pytest.mark.parametrize(
    ("count", "fraction", "validation"), [(10, 0.0, 0), (10, 0.25, 3), (10, 0.01, 1), (2, 0.5, 1)]
)
def test_rows_are_split_by_the_seed_alone(count: int, fraction: float, validation: int) -> None:
    data = DataSpec(validation_fraction=fraction)
    first, second = split_rows(count, data, seed=1)
    assert len(second) == validation
    assert sorted(first + second) == list(range(count))
    assert split_rows(count, data, seed=1) == (first, second)
    if validation:
        assert any(split_rows(count, data, seed)[1] != second for seed in range(2, 9))


@pytest.mark.parametrize(
    ("rows", "training", "steps"),
    [
        (9, {"epochs": 2}, 6),
        (8, {"epochs": 1}, 2),
        (1, {"epochs": 0.1}, 1),
        (8, {"epochs": 1.5}, 3),
        (8, {"max_steps": 7}, 7),
    ],
)
def test_steps_are_counted(rows: int, training: dict[str, Any], steps: int) -> None:
    assert count_steps(rows, TrainingSpec.model_validate(training)) == steps
