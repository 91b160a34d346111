from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.check import check_file, check_rows, preview
from core.data.detect import DatasetFormat
from core.data.schema import to_example
from core.errors import InvalidInput

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
RESULT = {"role": "tool", "content": "12 degrees"}
RESULT_ID = "messages[2].tool_call_id"
ARGUMENTS = "messages[1].tool_calls[0].function.arguments"


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


CALL = call('{"city": "Paris"}')


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
        [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}],
        [USER, CALL],
        [USER, CALL | {"content": "Let me see."}, RESULT, RESULT, ASSISTANT, USER, ASSISTANT],
        [USER, CALL, RESULT, CALL, RESULT | {"tool_call_id": "call_1"}, ASSISTANT],
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
        ([USER, {"role": "tool", "content": "1"}], "role_order", "messages[1]"),
        ([USER, CALL, ASSISTANT], "role_order", "messages[2]"),
        ([USER, CALL, RESULT, USER], "role_order", "messages[3]"),
        ([USER, CALL, RESULT], "no_answer", "messages[2]"),
        ([USER, CALL | {"tool_calls": []}], "wrong_type", "messages[1].tool_calls"),
        ([USER, USER | {"tool_calls": [{}]}], "unsupported_field", "messages[1].tool_calls"),
        ([USER, call("[1]")], "invalid_arguments", ARGUMENTS),
        ([USER, call("{")], "invalid_arguments", ARGUMENTS),
        ([USER, call(3)], "invalid_arguments", ARGUMENTS),
        ([USER, CALL, RESULT | {"tool_call_id": 3}, ASSISTANT], "wrong_type", RESULT_ID),
        ([USER, CALL, RESULT | {"tool_call_id": "x"}, ASSISTANT], "unknown_tool_call", RESULT_ID),
        ([USER, {"role": ["x"], "content": "1"}], "unknown_role", "messages[1].role"),
        ([USER, {"content": "1"}], "unknown_role", "messages[1].role"),
        ([USER, {"role": "assistant"}], "wrong_type", "messages[1].content"),
        ([USER, {"role": "assistant", "content": 3}], "wrong_type", "messages[1].content"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty", "messages[1].content"),
        ([USER, {"role": "assistant", "content": "a\0"}], "nul_byte", "messages[1].content"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "bad_unicode", "messages[1].content"),
        ([USER, ASSISTANT | {"weight": 0}], "nothing_trained", "messages"),
        ([USER, ASSISTANT | {"weight": 0.5}], "wrong_value", "messages[1].weight"),
        ([USER, ASSISTANT | {"weight": True}], "wrong_value", "messages[1].weight"),
        ([USER | {"weight": 1}, ASSISTANT], "unsupported_field", "messages[0].weight"),
        ([USER, ASSISTANT | {"mood": "x"}], "unsupported_field", "messages[1].mood"),
    ],
)
def test_what_cannot_be_trained_is_found(messages: Any, code: str, field: str) -> None:
    assert findings({"messages": messages}) == [(code, field)]


def test_rows_of_another_format_are_found() -> None:
    assert findings({"prompt": "a", "completion": "b"}) == [("missing_field", "messages")]
    pair = {"prompt": "a", "completion": "b"}
    assert findings({"prompt": "a"}, pair) == [("missing_field", "completion")]


def test_rows_with_tools_pass_and_what_only_openai_does_with_them_is_named() -> None:
    function = {"name": "weather", "description": None, "parameters": None}
    row = {
        "messages": [USER, CALL, RESULT, ASSISTANT],
        "tools": [{"type": "function", "function": function}],
        "parallel_tool_calls": False,
    }
    report = check_rows([row])
    assert (report.errors, report.ignored_fields) == ([], ["parallel_tool_calls"])
    example = to_example(row, "messages")
    assert example.tools == row["tools"]
    assert example.messages is not None
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert example.trained == (1, 3)


def test_fields_that_change_the_meaning_are_refused_and_others_named() -> None:
    row = {"messages": [USER, ASSISTANT]}
    assert findings(row | {"functions": []}) == [("unsupported_field", "functions")]
    assert findings(row | {"tools": []}) == [("wrong_type", "tools")]
    assert findings(row | {"tools": [{"type": "function", "function": {}}]}) == [
        ("wrong_type", "tools[0].function.name")
    ]
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
    with pytest.raises(InvalidInput, match="'question', 'answer'") as caught:
        check_rows([{"question": "a", "answer": "b"}])
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


HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}


@pytest.mark.parametrize(
    ("row", "good", "code", "field"),
    [
        ({"instruction": "a"}, {"instruction": "a", "output": "b"}, "missing_field", "response"),
        (
            {"instruction": "a", "response": "b", "output": "c"},
            {"instruction": "a", "output": "b"},
            "ambiguous_field",
            "output",
        ),
        (
            {"instruction": " ", "output": "b"},
            {"instruction": "a", "output": "b"},
            "empty",
            "instruction",
        ),
        (
            {"instruction": "a", "context": 3, "response": "b"},
            {"instruction": "a", "output": "b"},
            "wrong_type",
            "context",
        ),
        (
            {"conversations": [HUMAN, {"from": "bot", "value": "x"}]},
            {"conversations": [HUMAN, GPT]},
            "unknown_role",
            "conversations[1].from",
        ),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": ""}]},
            {"conversations": [HUMAN, GPT]},
            "empty",
            "conversations[1].value",
        ),
        (
            {"system": "s", "conversations": [{"from": "system", "value": "t"}, HUMAN, GPT]},
            {"conversations": [HUMAN, GPT]},
            "role_order",
            "conversations[0]",
        ),
        ({"text": ""}, {"text": "once"}, "empty", "text"),
    ],
)
def test_rows_of_other_formats_are_checked_too(
    row: dict[str, Any], good: dict[str, Any], code: str, field: str
) -> None:
    assert findings(row, good) == [(code, field)]


TURNS = [
    {"role": "user", "content": "Sum up.\n\nA long story."},
    {"role": "assistant", "content": "Short."},
]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": TURNS}, "messages"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion"),
        (
            {"instruction": "Sum up.", "context": "A long story.", "response": "Short."},
            "instruction",
        ),
        ({"instruction": "Sum up.", "input": "A long story.", "output": "Short."}, "instruction"),
        (
            {
                "conversations": [
                    {"from": "human", "value": TURNS[0]["content"]},
                    {"from": "gpt", "value": "Short."},
                ]
            },
            "sharegpt",
        ),
    ],
)
def test_all_spellings_of_a_conversation_mean_the_same(
    row: dict[str, Any],
    format: DatasetFormat,  # noqa: A002
) -> None:
    assert check_rows([row]).format == format
    example = to_example(row, format)
    assert example.messages == TURNS
    assert example.trained in (None, (1,))


def test_an_empty_context_leaves_no_trace() -> None:
    row = {"instruction": "Sing.", "input": "", "output": "La.", "system": "Be kind."}
    assert check_rows([row]).error_count == 0
    assert to_example(row, "instruction").messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Sing."},
        {"role": "assistant", "content": "La."},
    ]
