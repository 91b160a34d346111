"""Column mapping, several sources with weights, and validation rows of their own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from core.data.check import check_file, check_rows
from core.data.dry_run import dry_run, examine, render_dataset
from core.data.sources import DataSource
from core.data.split import repeat_rows
from core.errors import InvalidInput
from core.specs import JobSpec
from tests.support.tiny_model import make_tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
QUESTIONS = [{"id": n, "question": f"q{n}", "answer": f"a{n}"} for n in range(3)]
COLUMNS = {"prompt": "question", "completion": "answer"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def job(**members: Any) -> JobSpec:
    source = {} if "datasets" in members else {"dataset": "file-1"}
    return JobSpec.model_validate({"base_model": "tiny"} | source | members)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".csv":
            lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
            path.write_text("".join(",".join(line) + "\n" for line in lines))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path, rows: list[dict[str, Any]], **members: Any) -> DataSource:
    return DataSource(path=write(path, rows), name=path.stem, **members)


def pairs(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": "yes"} for prompt in prompts]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_columns_are_mapped_in_every_kind_of_file(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    path = write(tmp_path / f"rows.{kind}", QUESTIONS)
    assert check_file(path, path.name).format == "unknown"
    spec = job(data={"columns": COLUMNS})
    data = render_dataset(spec, [DataSource(path=path)], tokenizer)
    assert data.format == "prompt_completion"
    assert [(row.example.prompt, row.example.completion) for row in data.rows] == [
        ("q0", "a0"), ("q1", "a1"), ("q2", "a2"),
    ]  # fmt: skip


def test_the_mapped_fields_tell_the_format_and_replace_what_has_their_names(
    tmp_path: Path, tokenizer: Any
) -> None:
    row = {"prompt": "old", "text": "whole", "label": 1, "q": "new", "completion": "c"}
    spec = job(data={"columns": {"prompt": "q"}})
    data = render_dataset(spec, [source(tmp_path / "a", [row], format="text")], tokenizer)
    assert (data.format, data.rows[0].example.prompt) == ("prompt_completion", "new")
    swapped = job(data={"columns": {"prompt": "completion", "completion": "prompt"}})
    data = render_dataset(swapped, [source(tmp_path / "b", pairs("x"))], tokenizer)
    assert (data.rows[0].example.prompt, data.rows[0].example.completion) == ("yes", "x")


def test_a_mapped_cell_of_a_table_may_hold_a_conversation(tmp_path: Path, tokenizer: Any) -> None:
    turns = json.dumps(TURNS).replace('"', '""')
    path = tmp_path / "rows.csv"
    path.write_text(f'dialogue\n"{turns}"\nnope\n')
    spec = job(data={"columns": {"messages": "dialogue"}})
    report = examine(spec, [DataSource(path=path)], tokenizer)
    assert (report.format, report.rows) == ("messages", 1)
    assert [(e.line, e.code, e.field) for e in report.errors] == [(3, "malformed_json", "messages")]


def test_a_column_that_is_not_there_is_named_with_those_that_are(
    tmp_path: Path, tokenizer: Any
) -> None:
    spec = job(data={"columns": {"prompt": "question", "completion": "reply"}})
    with pytest.raises(InvalidInput, match="no column 'reply'") as caught:
        dry_run(spec, [source(tmp_path / "a", QUESTIONS)], tokenizer)
    assert (caught.value.code, caught.value.field) == ("unknown_column", "data.columns.completion")
    assert caught.value.hint == "There are 'id', 'question', 'answer'."
    with pytest.raises(InvalidInput, match="no column 'reply'"):
        check_rows(QUESTIONS, {"completion": "reply"})
    assert check_rows(QUESTIONS, {"prompt": "question", "completion": "answer"}).error_count == 0


def test_a_column_of_later_rows_may_be_mapped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"instruction": "a", "response": "b"}, {"instruction": "a", "response": "b", "x": "c"}]
    spec = job(data={"columns": {"context": "x"}})
    data = render_dataset(spec, [source(tmp_path / "a", rows)], tokenizer)
    assert data.rows[1].example.messages == [
        {"role": "user", "content": "a\n\nc"},
        {"role": "assistant", "content": "b"},
    ]


def test_foreign_columns_without_a_mapping_are_no_rows(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match="line 1 has 'id', 'question', 'answer'") as caught:
        dry_run(job(), [source(tmp_path / "a", QUESTIONS)], tokenizer)
    assert caught.value.code == "unknown_format"
    assert "data.columns" in (caught.value.hint or "")


def test_a_field_missing_everywhere_makes_a_file_unknown_and_one_missing_somewhere_wrong(
    tmp_path: Path,
) -> None:
    rows = [{"instruction": "a", "answer": "b"}] * 2
    path = write(tmp_path / "a.jsonl", rows)
    assert check_file(path, path.name).format == "unknown"
    path = write(tmp_path / "b.jsonl", [*rows, {"instruction": "a", "response": "b"}])
    report = check_file(path, path.name)
    assert (report.format, report.error_count) == ("instruction", 2)


def test_rows_come_as_often_as_their_weight_says(tmp_path: Path, tokenizer: Any) -> None:
    many = pairs(*(f"m{n}" for n in range(8)))
    sources = [
        source(tmp_path / "once", pairs("a", "b")),
        source(tmp_path / "more", pairs("c", "d"), weight=2.5),
        source(tmp_path / "half", many, weight=0.5),
    ]
    spec = job(datasets=[{"dataset": "once"}, {"dataset": "more"}, {"dataset": "half"}])
    data = render_dataset(spec, sources, tokenizer)
    training, validation = data.divide(spec)
    used = Counter(row.example.prompt for row in training)
    assert used["a"] == used["b"] == 1
    assert sorted([used["c"], used["d"]]) == [2, 3]
    assert sum(used[row["prompt"]] for row in many) == 4
    assert validation == []
    again, _ = render_dataset(spec, sources, tokenizer).divide(spec)
    assert [row.example.prompt for row in again] == [row.example.prompt for row in training]
    report = dry_run(spec, sources, tokenizer)
    assert (report.rows, report.training_rows) == (12, 11)
    assert [(s.dataset, s.rows, s.rows_per_epoch) for s in report.sources] == [
        ("once", 2, 2), ("more", 2, 5), ("half", 8, 4),
    ]  # fmt: skip


def test_the_seed_chooses_the_rows_of_a_fraction() -> None:
    chosen = {tuple(repeat_rows(list(range(20)), 0.5, seed)) for seed in "abcdef"}
    assert {len(rows) for rows in chosen} == {10}
    assert len(chosen) > 1
    assert repeat_rows([7], 0.1, "a") == [7]
    assert repeat_rows([], 0.1, "a") == []


def test_validation_rows_of_their_own_are_measured_on_and_compared(
    tmp_path: Path, tokenizer: Any
) -> None:
    spec = job(data={"validation_dataset": "held", "max_rows": 3})
    sources = [
        source(tmp_path / "learnt", pairs("a", "b", "b", "c")),
        source(tmp_path / "held", pairs("x", "b", "y", "x"), role="validation"),
    ]
    report = dry_run(spec, sources, tokenizer)
    assert (report.training_rows, report.validation_rows) == (3, 4)
    assert report.dropped == {"max_rows": 1}
    assert [o.model_dump() for o in report.overlap_rows] == [
        {"line": 2, "same_as_line": 2, "dataset": "held", "same_as_dataset": "learnt"}
    ]
    assert [(d.dataset, d.line, d.same_as_line) for d in report.duplicate_rows] == [
        ("learnt", 3, 2), ("held", 4, 1),
    ]  # fmt: skip
    assert "train_validation_overlap" in [warning.code for warning in report.warnings]
    data = render_dataset(spec, sources, tokenizer)
    training, validation = data.divide(spec)
    assert [row.example.prompt for row in training] == ["a", "b", "b"]
    assert [row.example.prompt for row in validation] == ["x", "b", "y", "x"]


def test_a_validation_data_set_of_which_nothing_is_left_is_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    spec = job(data={"validation_dataset": "held", "min_chars": {"user": 2}})
    sources = [
        source(tmp_path / "learnt", pairs("aa")),
        source(tmp_path / "held", pairs("b"), role="validation"),
    ]
    with pytest.raises(InvalidInput) as caught:
        dry_run(spec, sources, tokenizer)
    assert caught.value.code == "no_validation_rows"


def test_findings_name_the_data_set_and_its_line(tmp_path: Path, tokenizer: Any) -> None:
    sources = [
        source(tmp_path / "good", pairs("a")),
        source(tmp_path / "bad", [*pairs("a"), {"prompt": "b", "completion": ""}]),
        source(tmp_path / "strange", [{"x": 1}]),
    ]
    spec = job(datasets=[{"dataset": "good"}, {"dataset": "bad"}, {"dataset": "strange"}])
    report = examine(spec, sources, tokenizer)
    assert [(e.dataset, e.line, e.code) for e in report.errors] == [
        ("strange", 1, "unknown_format"), ("bad", 2, "empty"),
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match=r"^bad, line 2: the text is empty") as caught:
        dry_run(spec, sources[:2], tokenizer)
    assert caught.value.errors[0]["dataset"] == "bad"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"dataset": "hf:name@main"}, "hf:OWNER/NAME@REVISION"),
        ({"dataset": "hf:owner/name"}, "hf:OWNER/NAME@REVISION"),
        ({"dataset": "hf:owner/../x@main"}, "hf:OWNER/NAME@REVISION"),
        ({"dataset": "file-1", "split": "train"}, "only for data sets of the Hugging Face Hub"),
        ({"dataset": "hf:a/b@main", "split": "train+test"}, "split"),
        ({"dataset": "hf:a/b@main", "split": "train[:x]"}, "split"),
        ({"dataset": "file-1", "data": {"validation_split": "test"}}, "Hugging Face Hub"),
        ({"datasets": [{"dataset": "file-1", "split": "train"}]}, r"datasets\.0\.split"),
        ({"datasets": [{"dataset": "file-1", "weight": 0}]}, "greater than 0"),
        ({"dataset": "file-1", "data": {"columns": {"promt": "x"}}}, "prompt"),
    ],
)
def test_references_are_of_one_form(members: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JobSpec.model_validate({"base_model": "tiny"} | members)


@pytest.mark.parametrize("split", ["train", "train[:1%]", "train[10:200]", "train[90%:]"])
def test_a_split_may_be_a_slice(split: str) -> None:
    spec = JobSpec(base_model="tiny", dataset="hf:owner/na.me@refs/pr/1", split=split)
    assert spec.split == split
