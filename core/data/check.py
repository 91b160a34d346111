"""Check a data set row by row, without any model library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from core.data.columns import check_columns, map_rows
from core.data.detect import FORMAT_HINT, DatasetFormat, detect_format
from core.data.ingest import file_kind, parse_rows
from core.data.rows import ParsedRow, Problem
from core.data.schema import check_row, ignored_fields, lacks_field
from core.errors import InvalidInput
from core.specs import RowField

MAX_LISTED_ERRORS = 100
_MAX_IGNORED_FIELDS = 50
_MAX_COLUMNS = 100


class RowError(BaseModel):
    """One finding; `line` is 1-based, in the file or in the list of inline rows.

    `dataset` says which one, of a job with several.
    """

    model_config = ConfigDict(frozen=True)
    dataset: str | None = None
    line: int
    field: str | None = None
    message: str
    code: str


class DatasetReport(BaseModel):
    """What a check found.

    Attributes:
        format: Format of the rows; `unknown` of a file that lacks a column of every format, which
            only a job that names its columns can use.
        columns: Names of the first rows' fields.
        rows: Rows seen, bad ones included.
        errors: The first findings, at most 100.
        error_count: All findings.
        ignored_fields: Fields that some rows have and that training does not use.
    """

    model_config = ConfigDict(frozen=True)
    format: DatasetFormat | Literal["unknown"]
    columns: list[str] = []
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

    def add(self, line: int, problem: Problem, dataset: str = "") -> None:
        """Add one finding."""
        self.count += 1
        if len(self.listed) < MAX_LISTED_ERRORS:
            self.listed.append(
                RowError(
                    dataset=dataset or None,
                    line=line,
                    field=problem.field,
                    message=problem.message,
                    code=problem.code,
                )
            )


def invalid_dataset(errors: list[RowError], error_count: int) -> InvalidInput:
    """Return the error that reports these findings."""
    first = errors[0]
    more = f" (and {error_count - 1:,} more)" if error_count > 1 else ""
    where = f"{first.dataset}, line" if first.dataset else "line"
    return InvalidInput(
        f"{where} {first.line}: {first.message}{more}",
        code="invalid_dataset",
        field=first.field,
        line=first.line,
        hint=FORMAT_HINT,
        errors=[error.model_dump(exclude_none=True) for error in errors],
    )


def check_file(path: Path, filename: str, max_rows: int | None = None) -> DatasetReport:
    """Check an uploaded file.

    In a file of unknown format, whose columns a job may name, only what every file needs is
    checked.

    Args:
        path: The stored bytes.
        filename: The name it was sent under.
        max_rows: Most rows accepted.

    Raises:
        InvalidInput: The file as a whole is unusable: empty, of no known kind, too many rows.
            Findings in single rows are in the report; see `DatasetReport.raise_for_errors`.
    """
    check = _Check()
    for parsed in parse_rows(path, max_rows, file_kind(path, filename)):
        check.add(parsed)
    return check.report(mappable=True)


def check_rows(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[RowField, str] | None = None
) -> DatasetReport:
    """Check inline rows; a row's line is its 1-based position.

    Args:
        rows: The rows.
        columns: Field of the format → field of the rows.

    Raises:
        InvalidInput: There are no rows, their format is not known, or a column is not there.
    """
    parsed_rows = [ParsedRow(line, dict(row)) for line, row in enumerate(rows, start=1)]
    if columns:
        check_columns(parsed_rows, columns)
    check = _Check()
    for parsed in map_rows(parsed_rows, columns or {}):
        check.add(parsed)
    return check.report()


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


class _Check:
    """Looks at rows one by one."""

    def __init__(self) -> None:
        self._rows = 0
        self._format: DatasetFormat | None = None
        # Why there is none, once a row could be read.
        self._unknown: InvalidInput | None = None
        # What is wrong with the file, and what besides with its rows as rows of their format.
        self._unreadable = ErrorList()
        self._errors = ErrorList()
        self._columns: dict[str, None] = {}
        self._ignored: set[str] = set()

    def add(self, parsed: ParsedRow) -> None:
        """Look at the next row."""
        self._rows += 1
        if parsed.problem is not None:
            self._unreadable.add(parsed.line, parsed.problem)
            self._errors.add(parsed.line, parsed.problem)
            return
        if len(self._columns) < _MAX_COLUMNS:
            self._columns |= dict.fromkeys(parsed.row)
        if self._format is None and self._unknown is None:
            try:
                self._format = detect_format(parsed.row, parsed.line)
            except InvalidInput as error:
                self._unknown = error
        if self._format is None:
            return
        for problem in check_row(parsed.row, self._format):
            self._errors.add(parsed.line, problem)
        if len(self._ignored) < _MAX_IGNORED_FIELDS:
            self._ignored |= ignored_fields(parsed.row, self._format)

    def report(self, *, mappable: bool = False) -> DatasetReport:
        """Return what was found.

        Args:
            mappable: A job may name the columns, so that the format may be unknown.

        Raises:
            InvalidInput: Code `empty_dataset`, `invalid_dataset` or `unknown_format`.
        """
        if not self._rows:
            raise InvalidInput("the data set has no rows", code="empty_dataset", hint=FORMAT_HINT)
        if self._unknown is not None and not mappable:
            raise self._unknown
        if self._format is None and self._unknown is None:
            # Not one row could be read, so the findings are all there is to say.
            raise invalid_dataset(self._errors.listed, self._errors.count)
        lacking = self._format is not None and lacks_field(self._columns, self._format)
        known = None if mappable and lacking else self._format
        errors = self._unreadable if known is None else self._errors
        return DatasetReport(
            format=known or "unknown",
            columns=[name[:100] for name in self._columns][:_MAX_COLUMNS],
            rows=self._rows,
            errors=errors.listed,
            error_count=errors.count,
            ignored_fields=sorted(name[:100] for name in self._ignored)[:_MAX_IGNORED_FIELDS]
            if known
            else [],
        )
