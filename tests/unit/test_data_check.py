from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.check import check_file, check_rows, preview
from core.errors import InvalidInput

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}


def findings(row: dict[str, Any], good: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    report = check_rows([good or {"messages": [USER, ASSISTANT]}, row])
    assert report.error_count == len(report.errors)
    assert all(error.line == 2 for error in report.errors)
    return [(error.code, error.field or "") for error in report.errors]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [SYSTEM, USER, ASSISTANT],
        [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
        [USER, ASSISTANT | {"name": None}],
    ],
)
def test_conversations_that_can_be_trained_pass(messages: list[dict[str, Any]]) -> None:
    assert findings({"messages": messages}) == []


@pytest.mark.parametrize(
    ("messages", "code", "field"),
    [
        ("Hi", "wrong_type", "messages"),
        ([], "empty", "messages"),
        (["Hi"], "wrong_type", "messages[0]"),
        ([USER], "no_answer", "messages[0]"),
        ([SYSTEM], "no_answer", "messages[0]"),
        ([USER, ASSISTANT, USER], "no_answer", "messages[2]"),
        ([ASSISTANT], "role_order", "messages[0]"),
        ([USER, USER, ASSISTANT], "role_order", "messages[1]"),
        ([USER, ASSISTANT, ASSISTANT], "role_order", "messages[2]"),
        ([USER, SYSTEM, ASSISTANT], "role_order", "messages[1]"),
        ([USER, {"role": "tool", "content": "1"}], "unknown_role", "messages[1].role"),
        ([USER, {"role": ["x"], "content": "1"}], "unknown_role", "messages[1].role"),
        ([USER, {"content": "1"}], "unknown_role", "messages[1].role"),
        ([USER, {"role": "assistant"}], "wrong_type", "messages[1].content"),
        ([USER, {"role": "assistant", "content": 3}], "wrong_type", "messages[1].content"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty", "messages[1].content"),
        ([USER, {"role": "assistant", "content": "a\0"}], "nul_byte", "messages[1].content"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "bad_unicode", "messages[1].content"),
        ([USER, ASSISTANT | {"weight": 0}], "unsupported_field", "messages[1].weight"),
    ],
)
def test_what_cannot_be_trained_is_found(messages: Any, code: str, field: str) -> None:
    assert findings({"messages": messages}) == [(code, field)]


def test_rows_of_another_format_are_found() -> None:
    assert findings({"prompt": "a", "completion": "b"}) == [("missing_field", "messages")]
    pair = {"prompt": "a", "completion": "b"}
    assert findings({"prompt": "a"}, pair) == [("missing_field", "completion")]


def test_fields_that_change_the_meaning_are_refused_and_others_named() -> None:
    row = {"messages": [USER, ASSISTANT]}
    assert findings(row | {"tools": []}) == [("unsupported_field", "tools")]
    assert check_rows([row | {"id": 1}, row | {"topic": "x"}]).ignored_fields == ["id", "topic"]


@pytest.mark.parametrize(
    ("prompt", "completion", "code", "field"),
    [
        ("a", [ASSISTANT], "wrong_type", "completion"),
        (["a"], "b", "wrong_type", "completion"),
        (1, "b", "wrong_type", "prompt"),
        ("", "b", "empty", "prompt"),
        ("a", " ", "empty", "completion"),
        ([USER], [], "empty", "completion"),
        ([USER], [USER], "role_order", "completion[0]"),
        ([USER, ASSISTANT], [ASSISTANT], "role_order", "completion[0]"),
        ([SYSTEM], [USER], "no_answer", "completion[0]"),
    ],
)
def test_pairs_are_checked(prompt: Any, completion: Any, code: str, field: str) -> None:
    good = {"prompt": [USER], "completion": [ASSISTANT]}
    assert findings({"prompt": prompt, "completion": completion}, good) == [(code, field)]


def test_errors_are_counted_but_listed_up_to_a_hundred() -> None:
    report = check_rows([{"messages": [USER]}] * 250)
    assert (len(report.errors), report.error_count, report.rows) == (100, 250, 250)
    with pytest.raises(InvalidInput) as caught:
        report.raise_for_errors()
    assert (caught.value.code, caught.value.line) == ("invalid_dataset", 1)
    assert len(caught.value.errors) == 100
    assert "249 more" in caught.value.message


def test_an_unknown_format_names_the_fields_it_has() -> None:
    with pytest.raises(InvalidInput, match="'instruction', 'output'") as caught:
        check_rows([{"instruction": "a", "output": "b"}])
    assert caught.value.code == "unknown_format"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "code"),
    [("", "empty_dataset"), ("\n\n", "empty_dataset"), ("nope\n", "invalid_dataset")],
)
def test_a_file_without_a_row_is_refused(tmp_path: Path, content: str, code: str) -> None:
    path = tmp_path / "blob"
    path.write_text(content)
    with pytest.raises(InvalidInput) as caught:
        check_file(path, "rows.jsonl")
    assert caught.value.code == code


def test_a_file_is_checked_and_previewed(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    rows = [{"prompt": f"p{i}", "completion": "c", "id": i} for i in range(5)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    report = check_file(path, "rows.jsonl", max_rows=5)
    assert (report.format, report.rows, report.error_count) == ("prompt_completion", 5, 0)
    assert preview(path, report.format, offset=3, limit=5) == [
        {"line": 4, "row": {"prompt": "p3", "completion": "c"}},
        {"line": 5, "row": {"prompt": "p4", "completion": "c"}},
    ]
