"""Rows of CSV and Parquet files.

A CSV cell is a text; conversations stand in their cell as JSON. In Parquet, which has no lines, the
number of the row stands for its line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from core.data.rows import ParsedRow, Problem
from core.errors import InvalidInput, TooLarge

_NESTED_COLUMNS = ("messages", "conversations", "tools")
# Columns that hold a text or a list of turns.
_TURNS_OR_TEXT = ("prompt", "completion", "chosen", "rejected")
_MAX_CELL_CHARACTERS = 16 * 1024**2
_MAX_UNPACKED_BYTES = 8 * 1024**3
_BATCH_ROWS = 256


def parse_csv(path: Path) -> Iterator[ParsedRow]:
    """Yield the rows of a UTF-8 file whose first line names the columns.

    Columns are separated by tabs where the first line has one, else by semicolons where it has
    those and no comma, else by commas.

    Raises:
        InvalidInput: Code `bad_header`.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with path.open("rb") as stream:
        delimiter = _delimiter(stream.readline())
        stream.seek(0)
        reader = csv.reader(_decoded(stream), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_header(header)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"the first line cannot be read as CSV: {error}", code="bad_header", line=1
            ) from error
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                at = reader.line_num + 1
                yield ParsedRow(at, {}, Problem("bad_encoding", "the line is not valid UTF-8"))
                return
            except csv.Error as error:
                yield ParsedRow(line, {}, Problem("malformed_csv", f"malformed CSV: {error}"))
                return
            if cells:
                yield _csv_row(line, header, cells)


def parse_parquet(path: Path) -> Iterator[ParsedRow]:
    """Yield the rows of a Parquet file.

    Raises:
        InvalidInput: Code `malformed_parquet`.
        TooLarge: Code `too_large`; it would unpack to more than 8 GiB.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            unpacked = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            if unpacked > _MAX_UNPACKED_BYTES:
                raise TooLarge(f"the file unpacks to {unpacked:,} bytes", hint="Send it in parts.")
            line = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    line += 1
                    yield ParsedRow(line, {str(name): _plain(row[name]) for name in row})
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(
            f"the file cannot be read as Parquet: {error}", code="malformed_parquet"
        ) from error


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """Yield lines one by one, so that a bad byte is found in its own."""
    for number, line in enumerate(stream):
        yield line.decode("utf-8" if number else "utf-8-sig")


def _delimiter(first_line: bytes) -> str:
    if b"\t" in first_line:
        return "\t"
    return ";" if b";" in first_line and b"," not in first_line else ","


def _check_header(header: list[str]) -> None:
    names = [name.strip() for name in header]
    twice = {name for name in names if names.count(name) > 1}
    if not names or "" in names or twice:
        what = f"names {min(twice)!r} twice" if twice - {""} else "leaves a column without a name"
        raise InvalidInput(
            f"the first line {what}",
            code="bad_header",
            line=1,
            hint="The first line of a CSV file names the columns, such as prompt,completion.",
        )


def _csv_row(line: int, header: list[str], cells: list[str]) -> ParsedRow:
    if len(cells) != len(header):
        message = f"the row has {len(cells)} cells and the header {len(header)}"
        return ParsedRow(line, {}, Problem("wrong_columns", message))
    row: dict[str, Any] = {name.strip(): cell for name, cell in zip(header, cells, strict=True)}
    if not row.get("tools"):
        row.pop("tools", None)
    for name in _TURNS_OR_TEXT:
        if name in row:
            row[name] = _as_turns(row[name])
    for name in _NESTED_COLUMNS:
        if name in row:
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError) as error:
                problem = Problem("malformed_json", f"the cell is no JSON: {error}", name)
                return ParsedRow(line, {}, problem)
    return ParsedRow(line, row)


def _as_turns(cell: str) -> Any:
    """Return the list of turns that a cell spells out, or the cell itself."""
    if not cell.lstrip().startswith("["):
        return cell
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    spelled = turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return turns if spelled else cell


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it; others, such as dates, as text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {str(name): _plain(member) for name, member in value.items()}
        case list():
            return [_plain(member) for member in value]
        case bytes():
            return value.decode("utf-8", "replace")
    return str(value)
