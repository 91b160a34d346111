from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.dry_run import dry_run, examine
from core.data.sources import DataSource
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
        [DataSource(path=write(tmp_path, rows))],
        tokenizer,
    )
    assert (report.valid, report.format) == (True, "prompt_completion")
    assert (report.rows_read, report.rows, report.dropped) == (11, 11, {})
    assert (report.training_rows, report.validation_rows) == (9, 2)
    assert [(same.line, same.same_as_line) for same in report.duplicate_rows] == [(11, 1)]
    assert report.tokens is not None
    assert report.tokens.model_dump() == {
        "total": 89, "min": 4, "mean": 8.1, "p50": 8, "p95": 13, "max": 13,
    }  # fmt: skip
    assert (report.trained_tokens, report.steps) == (67, 6)
    assert report.total_tokens == 2 * report.tokens_per_epoch
    assert report.sample is not None
    sample = report.sample.model_dump(exclude_defaults=True)
    assert sample == {"line": 1, "text": "0:1<|im_end|>", "spans": [(2, 13)]}


def test_an_examination_tells_every_error_and_goes_on_with_the_rest(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [pair("a", "b"), pair("a", "b " * 40), {"prompt": "a"}, pair("a", "c" * 50)]
    path = write(tmp_path, rows)
    report = examine(spec(training={"max_length": 20}), [DataSource(path=path)], tokenizer)
    assert (report.valid, report.rows_read, report.rows, report.error_count) == (False, 4, 1, 3)
    found = [(error.line, error.field, error.code) for error in report.errors]
    assert found == [
        (2, None, "row_too_long"), (3, "completion", "missing_field"), (4, None, "row_too_long"),
    ]  # fmt: skip
    assert report.too_long is not None
    assert (report.too_long.rows, report.too_long.limit_tokens) == (2, 20)
    assert report.too_long.longest_tokens > 50


@pytest.mark.parametrize(
    ("code", "rows", "data"),
    [
        ("too_few_rows", [pair("a", "b")], {"validation_fraction": 0.1}),
        ("no_rows_left", [pair("a", "b")], {"min_chars": {"assistant": 9}}),
        ("unknown_format", [{"x": 1}], {}),
    ],
)
def test_an_examination_tells_what_is_wrong_with_the_whole(
    tmp_path: Path, tokenizer: Any, code: str, rows: list[dict[str, Any]], data: dict[str, Any]
) -> None:
    report = examine(spec(data=data), [DataSource(path=write(tmp_path, rows))], tokenizer)
    assert not report.valid
    assert [error.code for error in report.errors] == [code]


def test_rows_in_both_sets_are_named(tmp_path: Path, tokenizer: Any) -> None:
    report = dry_run(
        spec(data={"validation_fraction": 0.5}),
        [DataSource(path=write(tmp_path, [pair("a", "b")] * 6))],
        tokenizer,
    )
    _, validation = split_rows(6, DataSpec(validation_fraction=0.5), 0)
    assert [same.line for same in report.overlap_rows] == [index + 1 for index in validation]
    codes = {warning.code: warning.lines for warning in report.warnings}
    assert codes["duplicate_rows"] == [2, 3, 4, 5, 6]
    assert codes["train_validation_overlap"] == [index + 1 for index in validation]
    assert "few_rows" in codes


def test_warnings_need_a_reason(tmp_path: Path, tokenizer: Any) -> None:
    def codes(rows: list[dict[str, Any]], **members: Any) -> list[str]:
        report = dry_run(spec(**members), [DataSource(path=write(tmp_path, rows))], tokenizer)
        return [warning.code for warning in report.warnings]

    plain = [pair(str(n), f"answer {n}") for n in range(40)]
    assert codes(plain) == []
    long = [pair(str(n), "1" * 900) for n in range(4)]
    assert codes(plain + long) == ["long_rows_dominate"]
    read = [pair("1" * 300, str(n)) for n in range(40)]
    assert codes(read) == ["little_to_learn"]
    short = {"data": {"min_chars": {"assistant": 20}}}
    kept = [pair(str(n), f"a much longer answer {n}") for n in range(12)]
    assert codes(plain + kept, **short) == ["most_rows_dropped"]


def test_the_histogram_has_every_row_once(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [pair("0", "1" * n) for n in (1, 13, 14, 15, 80)])
    report = dry_run(spec(), [DataSource(path=path)], tokenizer)
    buckets = [(b.from_tokens, b.to_tokens, b.rows, b.rows_by_trained) for b in report.histogram]
    assert buckets == [(1, 16, 2, 3), (16, 32, 2, 1), (32, 64, 0, 0), (64, 128, 1, 1)]


def test_every_bad_row_is_listed_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    rows = [pair("a", "b"), pair("a", "b " * 40), {"prompt": "a"}, pair("a", "c" * 50)]
    with pytest.raises(InvalidInput) as caught:
        dry_run(
            spec(training={"max_length": 20}), [DataSource(path=write(tmp_path, rows))], tokenizer
        )
    assert caught.value.code == "invalid_dataset"
    found = [(error["line"], error["code"]) for error in caught.value.errors]
    assert found == [(2, "row_too_long"), (3, "missing_field"), (4, "row_too_long")]


def test_the_models_context_limits_rows_too(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [pair("a", "1" * 30)])
    assert dry_run(spec(), [DataSource(path=path)], tokenizer, context_length=32).rows == 1
    with pytest.raises(InvalidInput, match="32 tokens and the limit is 31"):
        dry_run(spec(), [DataSource(path=path)], tokenizer, context_length=31)


def test_messages_without_a_template_are_refused_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path, [{"messages": turns}] * 2)
    with pytest.raises(InvalidInput) as caught:
        dry_run(spec(), [DataSource(path=path)], make_tokenizer(None))
    assert caught.value.code == "no_chat_template"


def test_one_row_cannot_be_split(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [pair("a", "b")])
    with pytest.raises(InvalidInput) as caught:
        dry_run(spec(data={"validation_fraction": 0.1}), [DataSource(path=path)], tokenizer)
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
