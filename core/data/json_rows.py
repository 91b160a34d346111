"""Rows of JSONL and JSON-array files.

Bytes are read, not text: lines end at `\\n` only, so that a line number means what an editor shows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from core.data.rows import ParsedRow, Problem

_NOT_UTF8 = "not valid UTF-8"


def parse_lines(path: Path) -> Iterator[ParsedRow]:
    """Yield the rows of a JSONL file; blank lines are skipped."""
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


def parse_array(path: Path) -> Iterator[ParsedRow]:
    """Yield the rows of a file that holds one JSON array."""
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
