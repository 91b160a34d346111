"""What commands print: JSON for programs, tables for people, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from core.errors import TunesmithError

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]

_MAX_ERRORS_SHOWN = 10
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Print rows under their column titles, or the text `empty` when there are none.

    Cells are never cut where the output is no terminal, so that it can be searched.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        typer.echo(empty)
    elif sys.stdout.isatty():
        _draw_table(columns, cells)
    else:
        lines = [list(columns), *cells]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
            typer.echo("  ".join(padded).rstrip())


def print_members(members: Mapping[str, Any]) -> None:
    """Print names and values, one pair a line, leaving out what is `None`."""
    present = {name: _cell(value) for name, value in members.items() if value is not None}
    width = max(map(len, present), default=0)
    for name, value in present.items():
        typer.echo(f"{name:<{width}}  {value}")


def print_error(error: TunesmithError) -> None:
    """Print an error with its place, further findings and hint on stderr."""
    place = f"line {error.line}: " if error.line is not None else ""
    if error.field and error.field not in error.message:
        place += f"{error.field}: "
    lines = [f"error: {place}{error.message} ({error.code})"]
    findings = [finding for finding in error.errors if finding.get("message") != error.message]
    for finding in findings[:_MAX_ERRORS_SHOWN]:
        where = "".join(
            f"{name} {finding[name]}: " for name in ("line", "field") if finding.get(name)
        )
        lines.append(f"  - {where}{finding.get('message', finding)}")
    if len(findings) > _MAX_ERRORS_SHOWN:
        lines.append(f"  - and {len(findings) - _MAX_ERRORS_SHOWN} more")
    if error.hint:
        lines.append(f"hint: {error.hint}")
    typer.echo("\n".join(lines), err=True)


def note(text: str) -> None:
    """Tell the user something that is not part of the result, on stderr."""
    typer.echo(text, err=True)


def show_bytes(count: float) -> str:
    """Return a size such as `18.7 MiB`."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def show_seconds(seconds: float | None) -> str:
    """Return a duration such as `2m 05s`; empty when unknown."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"


def show_time(text: str | None) -> str:
    """Return an ISO 8601 instant in local time to the second; empty when unknown."""
    if not text:
        return ""
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return instant.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def is_interactive() -> bool:
    """Tell whether a person watches stderr, where live progress is drawn."""
    return sys.stderr.isatty()


def _draw_table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
