"""One data set of each format with one fault of each kind: all are named, each with its line."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import core.data
from core.data.dry_run import dry_run, examine
from core.data.report import DryRunReport
from core.data.sources import DataSource
from core.errors import InvalidInput
from core.specs import JobSpec
from tests.support.tiny_model import make_tokenizer

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {}}}


def row(*turns: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": list(turns)} | fields).encode()


def calling(**call: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [CALL | call]}


def chat(prompt: str, completion: str, **fields: Any) -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion} | fields).encode()


def order(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def share(*turns: tuple[str, str], **fields: Any) -> bytes:
    said = [{"from": role, "value": text} for role, text in turns]
    return json.dumps({"conversations": said} | fields).encode()


# File → its lines, each with the code and the field that it must be named with; "" is a good line.
FAULTS: dict[str, list[tuple[bytes, str, str | None]]] = {
    "messages.jsonl": [
        (row(USER, ANSWER), "", None),
        (b'{"messages": [', "malformed_json", None),
        (b'["a", "b"]', "not_an_object", None),
        (b'{"messages": "\xff"}', "bad_encoding", None),
        (b'{"messages": "\x00"}', "nul_byte", None),
        (b'{"dialogue": []}', "missing_field", "messages"),
        (b'{"messages": "Hi"}', "wrong_type", "messages"),
        (row(), "empty", "messages"),
        (row(USER, {"role": "bot", "content": "x"}), "unknown_role", "messages[1].role"),
        (row(USER, ANSWER | {"content": " "}), "empty", "messages[1].content"),
        (row(USER, ANSWER | {"content": 5}), "wrong_type", "messages[1].content"),
        (row(USER, ANSWER | {"content": "\ud800"}), "bad_unicode", "messages[1].content"),
        (row(USER, ANSWER | {"content": "a\x00"}), "nul_byte", "messages[1].content"),
        (row(ANSWER), "role_order", "messages[0]"),
        (row(USER, ANSWER, {"role": "system", "content": "x"}), "role_order", "messages[2]"),
        (row(USER), "no_answer", "messages[0]"),
        (row(USER, ANSWER | {"weight": 0}), "nothing_trained", "messages"),
        (row(USER, ANSWER | {"weight": 2}), "wrong_value", "messages[1].weight"),
        (row(USER | {"weight": 1}, ANSWER), "unsupported_field", "messages[0].weight"),
        (row(USER, ANSWER, images=["a.png"]), "unsupported_field", "images"),
        (row(USER, calling(function=3)), "wrong_type", "messages[1].tool_calls[0]"),
        (
            row(USER, calling(function={"name": "look", "arguments": "{"})),
            "invalid_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            row(USER, calling(), {"role": "tool", "content": "x", "tool_call_id": "2"}, ANSWER),
            "unknown_tool_call",
            "messages[2].tool_call_id",
        ),
        (row(USER, ANSWER | {"content": "1" * 600}), "row_too_long", None),
        (
            row(USER, ANSWER | {"content": "a<|im_end|>"}),
            "control_token_in_content",
            "messages[1].content",
        ),
        (row(USER, ANSWER), "", None),
    ],
    "pairs.csv": [
        (b"prompt,completion", "", None),
        (b"a,b", "", None),
        (b"a,b,c", "wrong_columns", None),
        (b"a,", "empty", "completion"),
        (b'"a"b,c', "malformed_csv", None),
    ],
    "instruction.jsonl": [
        (order(instruction="a", response="b"), "", None),
        (order(instruction="a", response="b", output="c"), "ambiguous_field", "output"),
        (order(instruction="a"), "missing_field", "response"),
        (order(instruction="a", response="b", context=7), "wrong_type", "context"),
    ],
    "sharegpt.jsonl": [
        (share(("human", "a"), ("gpt", "b")), "", None),
        (share(("narrator", "a"), ("gpt", "b")), "unknown_role", "conversations[0].from"),
        (
            share(("system", "x"), ("human", "a"), ("gpt", "b"), system="y"),
            "role_order",
            "conversations[0]",
        ),
    ],
    "text.jsonl": [
        (order(text="a"), "", None),
        (order(text=""), "empty", "text"),
    ],
}
PREFERENCES = [
    (order(prompt="a", chosen="b", rejected="c"), "", None),
    (order(prompt="a", chosen="b", rejected="b"), "same_answer", "rejected"),
    (order(chosen=[USER, ANSWER], rejected=[ANSWER | {"role": "user"}, ANSWER]),
     "prompts_differ", "rejected"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def sources(tmp_path: Path, files: dict[str, list[Any]]) -> list[DataSource]:
    for name, lines in files.items():
        (tmp_path / name).write_bytes(b"\n".join(content for content, _, _ in lines) + b"\n")
    return [DataSource(path=tmp_path / name, name=name) for name in files]


def expected(files: dict[str, list[Any]]) -> list[tuple[str, int, str, str | None]]:
    return [
        (name, line, code, field)
        for name, lines in files.items()
        for line, (_, code, field) in enumerate(lines, start=1)
        if code
    ]


def found(report: DryRunReport) -> list[tuple[str | None, int | None, str, str | None]]:
    return [(error.dataset, error.line, error.code, error.field) for error in report.errors]


def job(**members: Any) -> JobSpec:
    limits = {"training": {"max_length": 500}}
    return JobSpec.model_validate({"base_model": "tiny", "dataset": "x"} | limits | members)


def test_every_fault_is_named_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    report = examine(job(), sources(tmp_path, FAULTS), tokenizer)
    assert found(report) == expected(FAULTS)
    assert (report.valid, report.error_count) == (False, len(expected(FAULTS)))
    assert report.rows == 6
    assert report.too_long is not None
    assert report.too_long.rows == 1
    with pytest.raises(InvalidInput) as caught:
        dry_run(job(), sources(tmp_path, FAULTS), tokenizer)
    assert [(e["dataset"], e["line"], e["code"], e.get("field")) for e in caught.value.errors] == (
        expected(FAULTS)
    )


def test_every_fault_of_pairs_is_named_with_its_line(tmp_path: Path, tokenizer: Any) -> None:
    files = {"preferences.jsonl": PREFERENCES}
    report = examine(job(method={"type": "dpo"}), sources(tmp_path, files), tokenizer)
    assert found(report) == expected(files)


def test_no_kind_of_fault_is_left_out() -> None:
    known = {code for _, _, code, _ in expected(FAULTS | {"preferences": PREFERENCES})}
    for path in Path(core.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem":
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    assert code.value in known, f"{path.name}:{node.lineno} {code.value}"
