from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.data.ingest import file_kind, parse_rows, read_rows
from core.errors import InvalidInput, TooLarge


def write(tmp_path: Path, content: bytes | str) -> Path:
    path = tmp_path / "rows"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def parsed(tmp_path: Path, content: bytes | str) -> list[tuple[int, object]]:
    return [
        (row.line, row.problem.code if row.problem else row.row)
        for row in parse_rows(write(tmp_path, content))
    ]


def test_lines_are_numbered_as_an_editor_shows_them(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}\n{"a": 3}'
    assert parsed(tmp_path, content) == [(1, {"a": 1}), (4, {"a": "\u2028"}), (5, {"a": 3})]


def test_a_pretty_printed_array_gives_the_line_each_row_starts_on(tmp_path: Path) -> None:
    content = json.dumps([{"a": 1}, {"a": [2, 3]}], indent=2)
    lines = content.split("\n")
    expected = [index for index, line in enumerate(lines, 1) if line == "  {"]
    assert [line for line, _ in parsed(tmp_path, content)] == expected


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b"{oops", "malformed_json"),
        (b'{"a": NaN}', "malformed_json"),
        (b'{"a": 1} {"a": 2}', "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "malformed_json"),
        (b'"text"', "not_an_object"),
        (b"[1]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"a": "\xff"}', "bad_encoding"),
        (b'{"a": "\x00"}', "nul_byte"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, bad: bytes, code: str) -> None:
    content = b'{"a": 1}\n' + bad + b'\n{"a": 3}\n'
    assert parsed(tmp_path, content) == [(1, {"a": 1}), (2, code), (3, {"a": 3})]


@pytest.mark.parametrize(
    ("content", "line", "code"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', 3, "malformed_json"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "malformed_json"),
        ('[{"a": 1},\n7]', 2, "not_an_object"),
        ('[{"a": 1}', 1, "malformed_json"),
        ('[{"a": 1}]\nmore', 2, "malformed_json"),
        (b'[\n{"a": "\xff"}]', 2, "bad_encoding"),
    ],
)
def test_a_bad_array_is_reported_where_it_breaks(
    tmp_path: Path, content: bytes | str, line: int, code: str
) -> None:
    assert parsed(tmp_path, content)[-1] == (line, code)


def test_empty_files_and_empty_arrays_have_no_rows(tmp_path: Path) -> None:
    assert parsed(tmp_path, "") == []
    assert parsed(tmp_path, "\n \n") == []
    assert parsed(tmp_path, "[ ]\n") == []


def test_read_rows_raises_with_the_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, '{"a": 1}\nnope\n'))
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(InvalidInput) as caught:
        next(rows)
    assert (caught.value.code, caught.value.line) == ("malformed_json", 2)


def test_more_rows_than_allowed_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1}\n' * 3)
    assert len(list(parse_rows(path, max_rows=3))) == 3
    with pytest.raises(TooLarge) as caught:
        list(parse_rows(path, max_rows=2))
    assert (caught.value.code, caught.value.line) == ("too_many_rows", 3)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("rows.xlsx", b"a,b\n", "unsupported_file_type"),
        ("rows.parquet", b"a,b\n", "unsupported_file_type"),
        ("rows.jsonl", b"\x1f\x8b\x08", "unsupported_file_type"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), "bad_encoding"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        file_kind(write(tmp_path, content), name)
    assert caught.value.code == code
