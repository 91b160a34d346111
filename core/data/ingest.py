"""Read rows from JSONL and JSON-array files, each with the line it starts on.

Bytes are read, not text: lines end at `\\n` only, so that a line number means what an editor shows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from core.errors import InvalidInput, TooLarge

_FOREIGN_SUFFIXES = (
    ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".zip", ".gz", ".tgz", ".zst", ".bz2", ".xz",
)  # fmt: skip
_FOREIGN_MAGIC = (b"PAR1", b"PK\x03\x04", b"\x1f\x8b", b"ARROW1", b"\x28\xb5\x2f\xfd")
_SUPPORTED = "Send JSONL (one JSON object per line) or one JSON array of objects, in UTF-8."
_NOT_UTF8 = "not valid UTF-8"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row.

    Attributes:
        code: Stable identifier, such as `malformed_json`.
        message: One sentence.
        field: Path inside the row, such as `messages[2].content`.
    """

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True)
class ParsedRow:
    """One row of a file: its object, or why there is none.

    Attributes:
        line: 1-based line that the row starts on.
        row: The object; empty where `problem` is set.
        problem: Why the row could not be read.
    """

    line: int
    row: dict[str, Any]
    problem: Problem | None = None


def check_file_kind(path: Path, filename: str) -> None:
    """Refuse what is plainly no JSON, by name or first bytes.

    Raises:
        InvalidInput: Code `unsupported_file_type` or `bad_encoding`.
    """
    with path.open("rb") as stream:
        head = stream.read(8)
    if filename.lower().endswith(_FOREIGN_SUFFIXES) or head.startswith(_FOREIGN_MAGIC):
        raise InvalidInput(
            f"{filename!r} is not a JSON file", code="unsupported_file_type", hint=_SUPPORTED
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidInput("the file is in UTF-16", code="bad_encoding", hint="Save it as UTF-8.")


def parse_rows(path: Path, max_rows: int | None = None) -> Iterator[ParsedRow]:
    """Yield every row of a JSONL or JSON-array file; a row that cannot be read has its problem.

    Args:
        path: The file; a UTF-8 byte order mark is allowed, blank lines are skipped.
        max_rows: Most rows accepted.

    Raises:
        TooLarge: Code `too_many_rows`.
    """
    rows = _parse_array(path) if _first_character(path) == b"[" else _parse_lines(path)
    for count, parsed in enumerate(rows, start=1):
        if max_rows is not None and count > max_rows:
            raise TooLarge(
                f"the data set has more than {max_rows:,} rows",
                code="too_many_rows",
                line=parsed.line,
                hint="Send fewer rows, or ask the operator to raise the limit.",
            )
        yield parsed


def read_rows(path: Path, max_rows: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) and stop at the first row that cannot be read.

    Raises:
        InvalidInput: Code of the problem, with its line; `too_many_rows`.
    """
    for parsed in parse_rows(path, max_rows):
        if parsed.problem is not None:
            raise InvalidInput(
                f"line {parsed.line}: {parsed.problem.message}",
                code=parsed.problem.code,
                line=parsed.line,
                field=parsed.problem.field,
                hint=_SUPPORTED,
            )
        yield parsed.line, parsed.row


def _first_character(path: Path) -> bytes:
    with path.open("rb") as stream:
        head = stream.read(64 * 1024).removeprefix(codecs.BOM_UTF8)
    return head.lstrip()[:1]


def _parse_lines(path: Path) -> Iterator[ParsedRow]:
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            content = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if content.isspace() or not content:
                continue
            yield _parse_line(line, content)


def _parse_line(line: int, content: bytes) -> ParsedRow:
    if b"\x00" in content:
        return ParsedRow(line, {}, Problem("nul_byte", "the line holds a NUL byte"))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the line is {_NOT_UTF8} at its byte {error.start + 1}"
        return ParsedRow(line, {}, Problem("bad_encoding", message))
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return ParsedRow(line, {}, Problem("malformed_json", _explain(error)))
    return _as_row(line, value)


def _parse_array(path: Path) -> Iterator[ParsedRow]:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield ParsedRow(line, {}, Problem("bad_encoding", f"the file is {_NOT_UTF8} here"))
        return

    line, counted = 1, 0

    def line_at(position: int) -> int:
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        return line

    position = _skip_blanks(text, text.index("[") + 1)
    if text[position : position + 1] == "]":
        position += 1
    else:
        while True:
            start = position
            try:
                value, position = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                at = error.pos if isinstance(error, json.JSONDecodeError) else start
                problem = Problem("malformed_json", _explain(error))
                yield ParsedRow(line_at(max(at, counted)), {}, problem)
                return
            yield _as_row(line_at(start), value)
            position = _skip_blanks(text, position)
            separator = text[position : position + 1]
            position = _skip_blanks(text, position + 1)
            if separator == "]":
                break
            if separator != ",":
                problem = Problem("malformed_json", "expected ',' or ']' after a row of the array")
                yield ParsedRow(line_at(max(position - 1, counted)), {}, problem)
                return
    position = _skip_blanks(text, position)
    if position < len(text):
        problem = Problem("malformed_json", "something follows the end of the array")
        yield ParsedRow(line_at(max(position, counted)), {}, problem)


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _as_row(line: int, value: Any) -> ParsedRow:
    if isinstance(value, dict):
        return ParsedRow(line, value)
    kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
    return ParsedRow(line, {}, Problem("not_an_object", f"the row is {kind}, not a JSON object"))


def _explain(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        # The decoder's own position counts lines inside one row; only the column helps here.
        return f"malformed JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "malformed JSON: nested too deeply"
    return f"malformed JSON: {error}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
