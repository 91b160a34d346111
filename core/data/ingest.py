"""Read the rows of an uploaded file, whatever kind it is."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from core.data.json_rows import parse_array, parse_lines
from core.data.rows import ParsedRow
from core.data.tables import parse_csv, parse_parquet
from core.errors import InvalidInput, TooLarge

FileKind = Literal["jsonl", "json", "csv", "parquet"]

_TABLE_SUFFIXES = (".csv", ".tsv")
_FOREIGN_SUFFIXES = (
    ".arrow", ".feather", ".xls", ".xlsx", ".zip", ".gz", ".tgz", ".zst", ".bz2", ".xz",
)  # fmt: skip
_FOREIGN_MAGIC = (b"PK\x03\x04", b"\x1f\x8b", b"ARROW1", b"\x28\xb5\x2f\xfd")
_PARQUET_MAGIC = b"PAR1"
_SUPPORTED = (
    "Send JSONL (one JSON object per line), one JSON array of objects, CSV with a header, all in "
    "UTF-8, or Parquet."
)
_PARSERS: dict[FileKind, Callable[[Path], Iterator[ParsedRow]]] = {
    "jsonl": parse_lines,
    "json": parse_array,
    "csv": parse_csv,
    "parquet": parse_parquet,
}


def file_kind(path: Path, filename: str) -> FileKind:
    """Return the kind of an upload, by its content and, for what may be CSV, by its name.

    Raises:
        InvalidInput: Code `unsupported_file_type` or `bad_encoding`.
    """
    with path.open("rb") as stream:
        head = stream.read(8)
    name = filename.lower()
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    if name.endswith((*_FOREIGN_SUFFIXES, ".parquet")) or head.startswith(_FOREIGN_MAGIC):
        raise InvalidInput(
            f"{filename!r} is of a kind that cannot be read",
            code="unsupported_file_type",
            hint=_SUPPORTED,
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidInput("the file is in UTF-16", code="bad_encoding", hint="Save it as UTF-8.")
    kind = stored_kind(path)
    return "jsonl" if kind == "csv" and not name.endswith(_TABLE_SUFFIXES) else kind


def stored_kind(path: Path) -> FileKind:
    """Return the kind of a file that was accepted, which its first character tells."""
    with path.open("rb") as stream:
        head = stream.read(64 * 1024)
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    kinds: dict[bytes, FileKind] = {b"[": "json", b"{": "jsonl", b"": "jsonl"}
    return kinds.get(first, "csv")


def parse_rows(
    path: Path, max_rows: int | None = None, kind: FileKind | None = None
) -> Iterator[ParsedRow]:
    """Yield every row of a file; a row that cannot be read has its problem.

    Args:
        path: The file; a UTF-8 byte order mark is allowed, blank lines are skipped.
        max_rows: Most rows accepted.
        kind: From `file_kind`; found from the content of an accepted file when absent.

    Raises:
        TooLarge: Code `too_many_rows`.
        InvalidInput: Code `bad_header` or `malformed_parquet`.
    """
    rows = _PARSERS[kind or stored_kind(path)](path)
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
    """Yield (line, row) of an accepted file and stop at the first row that cannot be read.

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
