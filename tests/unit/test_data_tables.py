from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from core.data.check import check_file
from core.data.ingest import file_kind, parse_rows, read_rows, stored_kind
from core.errors import InvalidInput, TooLarge


def write(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def write_parquet(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "blob"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_csv_rows_have_the_line_they_start_on(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '\ufeffprompt,completion\r\n"What, now?","two\r\nlines"\r\n\r\nnext,"say ""hi"""\r\n',
    )
    assert file_kind(path, "rows.csv") == stored_kind(path) == "csv"
    assert list(read_rows(path)) == [
        (2, {"prompt": "What, now?", "completion": "two\r\nlines"}),
        (5, {"prompt": "next", "completion": 'say "hi"'}),
    ]


@pytest.mark.parametrize("separator", ["\t", ";", ","])
def test_the_first_line_tells_what_separates_columns(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path, separator.join(("prompt", "completion")) + "\n" + f"a{separator}b\n")
    assert list(read_rows(path)) == [(2, {"prompt": "a", "completion": "b"})]


def test_a_conversation_stands_in_its_cell_as_json(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    turns = turns.replace('"', '""')
    report = check_file(write(tmp_path, f'messages\n"{turns}"\n"no"\n'), "rows.csv")
    assert (report.format, report.rows) == ("messages", 2)
    assert [(error.line, error.code, error.field) for error in report.errors] == [
        (3, "malformed_json", "messages")
    ]


def test_answers_in_cells_are_texts_or_turns(tmp_path: Path) -> None:
    def answer(text: str) -> str:
        return '"' + json.dumps([{"role": "assistant", "content": text}]).replace('"', '""') + '"'

    prompt = answer("Hi").replace("assistant", "user")
    turns = f"prompt,chosen,rejected\n{prompt},{answer('good')},{answer('bad')}\n"
    report = check_file(write(tmp_path, turns), "rows.csv")
    assert (report.format, report.errors) == ("preference", [])
    (_, row), *_ = read_rows(tmp_path / "blob")
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    path = write(tmp_path, "prompt,completion\na,[1]\nb,[{no\n")
    assert [row["completion"] for _, row in read_rows(path)] == ["[1]", "[{no"]


def test_tools_stand_in_their_cell_as_json_or_not_at_all(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    cells = ['"' + json.dumps(value).replace('"', '""') + '"' for value in (turns, tools)]
    path = write(tmp_path, f"messages,tools\n{cells[0]},{cells[1]}\n{cells[0]},\n")
    assert check_file(path, "rows.csv").errors == []
    assert [row.get("tools") for _, row in read_rows(path)] == [tools, None]


@pytest.mark.parametrize(
    ("bad", "line", "code"),
    [
        (b"a,b,c\n", 3, "wrong_columns"),
        (b"a\n", 3, "wrong_columns"),
        (b'"a,b\n', 3, "malformed_csv"),
        (b'"a"x,b\n', 3, "malformed_csv"),
        (b"\xff,b\n", 3, "bad_encoding"),
        (b"a,\n", 3, "empty"),
        (b"a,b\x00\n", 3, "nul_byte"),
    ],
)
def test_bad_csv_rows_are_named(tmp_path: Path, bad: bytes, line: int, code: str) -> None:
    report = check_file(write(tmp_path, b"prompt,completion\na,b\n" + bad), "rows.csv")
    assert [(error.line, error.code) for error in report.errors] == [(line, code)]


@pytest.mark.parametrize("header", ["a,a\n1,2\n", "a,\n1,2\n", "a, a\n1,2\n"])
def test_a_header_that_names_no_columns_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_file(write(tmp_path, header), "rows.csv")
    assert (caught.value.code, caught.value.line) == ("bad_header", 1)


def test_what_is_not_called_csv_is_read_as_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "prompt,completion\na,b\n")
    assert file_kind(path, "rows.jsonl") == "jsonl"
    with pytest.raises(InvalidInput) as caught:
        check_file(path, "rows.jsonl")
    assert caught.value.errors[0]["code"] == "malformed_json"


def test_parquet_rows_are_numbered_and_plain(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"messages": turns, "day": datetime.date(2024, 1, 2)} for _ in range(600)]
    path = write_parquet(tmp_path, rows)
    assert file_kind(path, "rows.parquet") == stored_kind(path) == "parquet"
    report = check_file(path, "rows.parquet", max_rows=600)
    assert (report.format, report.rows, report.error_count) == ("messages", 600, 0)
    assert report.ignored_fields == ["day"]
    assert list(parse_rows(path))[599].line == 600
    assert next(iter(parse_rows(path))).row["day"] == "2024-01-02"
    with pytest.raises(TooLarge):
        check_file(path, "rows.parquet", max_rows=599)


def test_findings_in_parquet_name_the_row(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]
    )
    report = check_file(path, "rows.parquet")
    assert [(error.line, error.code, error.field) for error in report.errors] == [
        (2, "wrong_type", "completion")
    ]


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, [{"prompt": "a", "completion": "b"}])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidInput) as caught:
        check_file(path, "rows.parquet")
    assert caught.value.code == "malformed_parquet"
