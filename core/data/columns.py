"""Column mapping: read a file whose columns have other names than the format's fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.data.detect import DatasetFormat, detect_format
from core.data.ingest import parse_rows
from core.data.rows import ParsedRow, Problem
from core.data.schema import ignored_fields
from core.errors import InvalidInput
from core.specs import RowField

# Cells of a CSV file in which a conversation stands as JSON.
_NESTED_FIELDS = ("messages", "conversations")
_MOST_SHOWN = 20


def check_columns(rows: Iterable[ParsedRow], columns: Mapping[RowField, str]) -> None:
    """Check that each column of a mapping is in some row.

    Reads no farther than the first row as a rule.

    Raises:
        InvalidInput: Code `unknown_column`; its hint lists what there is.
    """
    wanted = set(columns.values())
    known: dict[str, None] = {}
    for parsed in rows:
        known |= dict.fromkeys(parsed.row)
        if wanted <= known.keys():
            return
    if not known:
        return  # not one row can be read, which is told by the rows
    field, column = next((f, c) for f, c in columns.items() if c not in known)
    shown = ", ".join(map(repr, list(known)[:_MOST_SHOWN]))
    raise InvalidInput(
        f"there is no column {column!r}",
        code="unknown_column",
        field=f"data.columns.{field}",
        hint=f"There are {shown}{', …' if len(known) > _MOST_SHOWN else ''}.",
    )


def map_rows(rows: Iterable[ParsedRow], columns: Mapping[RowField, str]) -> Iterator[ParsedRow]:
    """Yield rows with their columns under the names of the format's fields.

    What a mapped field was called in the file, and what the file has under a mapped name, is gone.
    Of the columns that are not mapped those stay that the format knows.

    Raises:
        InvalidInput: Code `unknown_format`.
    """
    if not columns:
        yield from rows
        return
    format: DatasetFormat | None = None  # noqa: A001
    for parsed in rows:
        if parsed.problem is not None:
            yield parsed
            continue
        mapped: dict[str, Any] = {
            field: parsed.row[name] for field, name in columns.items() if name in parsed.row
        }
        taken = {*columns, *columns.values()}
        rest = {name: value for name, value in parsed.row.items() if name not in taken}
        problem = _unfold(mapped)
        if problem is not None:
            yield ParsedRow(parsed.line, {}, problem)
            continue
        if format is None:
            format = _detect(mapped, rest, parsed.line)  # noqa: A001
        ignored = ignored_fields(rest, format)
        kept = {name: value for name, value in rest.items() if name not in ignored}
        yield ParsedRow(parsed.line, {**mapped, **kept})


def parse_source(path: Path, columns: Mapping[RowField, str]) -> Iterator[ParsedRow]:
    """Yield the rows of an accepted file under the names that a mapping gives its columns.

    Raises:
        InvalidInput: Code `unknown_column` or `unknown_format`.
    """
    if columns:
        check_columns(parse_rows(path), columns)
    return map_rows(parse_rows(path), columns)


def _detect(mapped: Mapping[str, Any], rest: Mapping[str, Any], line: int) -> DatasetFormat:
    """Return the format that the mapped fields tell, else the whole row."""
    try:
        return detect_format(mapped, line)
    except InvalidInput:
        return detect_format({**mapped, **rest}, line)


def _unfold(mapped: dict[str, Any]) -> Problem | None:
    for name in _NESTED_FIELDS:
        value = mapped.get(name)
        if isinstance(value, str):
            try:
                mapped[name] = json.loads(value)
            except (ValueError, RecursionError) as error:
                return Problem("malformed_json", f"the cell is no JSON: {error}", name)
    return None
