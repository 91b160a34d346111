"""Check a data set row by row, without any model library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from core.data.detect import FORMAT_HINT, DatasetFormat, detect_format
from core.data.ingest import file_kind, parse_rows
from core.data.rows import ParsedRow, Problem
from core.data.schema import check_row, ignored_fields
from core.errors import InvalidInput

MAX_LISTED_ERRORS = 100
_MAX_IGNORED_FIELDS = 50


class RowError(BaseModel):
    """One finding; `line` is 1-based, in the file or in the list of inline rows."""

    model_config = ConfigDict(frozen=True)
    line: int
    field: str | None = None
    message: str
    code: str


class DatasetReport(BaseModel):
    """What a check found.

    Attributes:
        format: Format of the rows.
        rows: Rows seen, bad ones included.
        errors: The first findings, at most 100.
        error_count: All findings.
        ignored_fields: Fields that some rows have and that training does not use.
    """

    model_config = ConfigDict(frozen=True)
    format: DatasetFormat
    rows: int
    errors: list[RowError] = []
    error_count: int = 0
    ignored_fields: list[str] = []

    def raise_for_errors(self) -> None:
        """Refuse a data set with findings.

        Raises:
            InvalidInput: Code `invalid_dataset`; lists the findings, with the line of the first.
        """
        if self.error_count:
            raise invalid_dataset(self.errors, self.error_count)


class ErrorList:
    """Collects findings, keeping the first 100 and counting all."""

    def __init__(self) -> None:
        self.listed: list[RowError] = []
        self.count = 0

    def add(self, line: int, problem: Problem) -> None:
        """Add one finding."""
        self.count += 1
        if len(self.listed) < MAX_LISTED_ERRORS:
            self.listed.append(
                RowError(line=line, field=problem.field, message=problem.message, code=problem.code)
            )


def invalid_dataset(errors: list[RowError], error_count: int) -> InvalidInput:
    """Return the error that reports these findings."""
    first = errors[0]
    more = f" (and {error_count - 1:,} more)" if error_count > 1 else ""
    return InvalidInput(
        f"line {first.line}: {first.message}{more}",
        code="invalid_dataset",
        field=first.field,
        line=first.line,
        hint=FORMAT_HINT,
        errors=[error.model_dump(exclude_none=True) for error in errors],
    )


def check_file(path: Path, filename: str, max_rows: int | None = None) -> DatasetReport:
    """Check an uploaded file.

    Args:
        path: The stored bytes.
        filename: The name it was sent under.
        max_rows: Most rows accepted.

    Raises:
        InvalidInput: The file as a whole is unusable: empty, of no known kind or format, too many
            rows. Findings in single rows are in the report; see `DatasetReport.raise_for_errors`.
    """
    return _check(parse_rows(path, max_rows, file_kind(path, filename)))


def check_rows(rows: Iterable[Mapping[str, Any]]) -> DatasetReport:
    """Check inline rows as `check_file` does; a row's line is its 1-based position.

    Raises:
        InvalidInput: There are no rows, or their format is not known.
    """
    return _check(ParsedRow(line, dict(row)) for line, row in enumerate(rows, start=1))


def preview(
    path: Path,
    format: DatasetFormat | None = None,  # noqa: A002
    offset: int = 0,
    limit: int = 20,
) -> list[dict[str, Any]]:
    """Return `{"line", "row"}` of up to `limit` rows after the first `offset`.

    Args:
        path: A file that `check_file` has accepted.
        format: Its format; when given, only the fields that belong to it are shown.
        offset: Rows to skip.
        limit: Most rows returned.
    """
    return [
        {
            "line": parsed.line,
            "row": {
                name: value
                for name, value in parsed.row.items()
                if format is None or name not in ignored_fields(parsed.row, format)
            },
        }
        for parsed in islice(parse_rows(path), offset, offset + limit)
    ]


def _check(parsed_rows: Iterator[ParsedRow]) -> DatasetReport:
    format: DatasetFormat | None = None  # noqa: A001
    rows = 0
    errors = ErrorList()
    ignored: set[str] = set()
    for parsed in parsed_rows:
        rows += 1
        if parsed.problem is not None:
            errors.add(parsed.line, parsed.problem)
            continue
        if format is None:
            format = detect_format(parsed.row, parsed.line)  # noqa: A001
        for problem in check_row(parsed.row, format):
            errors.add(parsed.line, problem)
        if len(ignored) < _MAX_IGNORED_FIELDS:
            ignored |= ignored_fields(parsed.row, format)
    if not rows:
        raise InvalidInput("the data set has no rows", code="empty_dataset", hint=FORMAT_HINT)
    if format is None:
        # Not one row could be read, so the findings are all there is to say.
        raise invalid_dataset(errors.listed, errors.count)
    return DatasetReport(
        format=format,
        rows=rows,
        errors=errors.listed,
        error_count=errors.count,
        ignored_fields=sorted(name[:100] for name in ignored)[:_MAX_IGNORED_FIELDS],
    )
