"""`tunesmith jobs validate`: what a job would do, without doing it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from core.errors import Unavailable
from service.cli.client import ServiceClient
from service.cli.output import note, print_members, print_table, show_bytes, show_seconds

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0
_BAR_WIDTH = 20
_WIDTH = 100


def validate(service: ServiceClient, spec: dict[str, Any]) -> dict[str, Any]:
    """Have a spec checked and return the validation once it has ended.

    Raises:
        TunesmithError: The service refused, or was gone for long.
    """
    found: dict[str, Any] = service.call("POST", "/jobs/validate", json=spec)
    if found["status"] == "validating":
        note(f"{found['id']} is going on")
    answered = time.monotonic()
    while found["status"] == "validating":
        time.sleep(_POLL_SECONDS)
        try:
            found = service.call("GET", f"/jobs/validations/{found['id']}")
            answered = time.monotonic()
        except Unavailable:
            if time.monotonic() - answered > _PATIENCE_SECONDS:
                raise
    return found


def print_validation(found: dict[str, Any]) -> None:
    """Print the report for people: findings first, then figures, the sample and the estimate."""
    report = found["report"]
    _print_findings(report)
    if report.get("sources"):
        _section("data sets")
        _print_sources(report["sources"])
    _section("rows")
    _print_rows(report)
    for warning in report["warnings"]:
        lines = ", ".join(map(str, warning["lines"]))
        where = f"; lines {lines}" if lines else ""
        typer.echo(f"warning: {warning['message']} ({warning['code']}){where}")
    if report["dropped"]:
        _section("left out")
        print_table(("reason", "rows"), sorted(report["dropped"].items()), empty="")
    if report["histogram"]:
        _section("tokens per row")
        _print_histogram(report["histogram"])
    if report["sample"]:
        _section(f"line {report['sample']['line']} as the model reads it; what is learnt is marked")
        _print_marked(report["sample"]["text"], report["sample"]["spans"])
        if report["sample"].get("rejected_text") is not None:
            _section("the same prompt with the answer that was rejected")
            _print_marked(report["sample"]["rejected_text"], report["sample"]["rejected_spans"])
    _section("training")
    _print_estimate(report, found["estimate"] or {})


def _section(title: str) -> None:
    typer.echo(f"\n{title}")


def _print_findings(report: dict[str, Any]) -> None:
    if report["valid"]:
        typer.echo("valid: a job would go on to training")
        return
    typer.echo(f"invalid: {report['error_count']:,} errors")
    print_table(
        (*_data_set_title(report), "line", "field", "code", "message"),
        [
            (
                *([error["dataset"]] if _data_set_title(report) else []),
                error["line"],
                error["field"],
                error["code"],
                error["message"],
            )
            for error in report["errors"]
        ],
        empty="",
    )
    listed = len(report["errors"])
    if listed < report["error_count"]:
        typer.echo(f"and {report['error_count'] - listed:,} more")


def _data_set_title(report: dict[str, Any]) -> tuple[str, ...]:
    """Return the heading of a column that only several data sets need."""
    return ("data set",) if report.get("sources") else ()


def _print_sources(sources: list[dict[str, Any]]) -> None:
    print_table(
        ("data set", "for", "weight", "format", "read", "kept", "per epoch"),
        [
            (
                source["dataset"],
                source["role"],
                f"{source['weight']:g}",
                source["format"],
                source["rows_read"],
                source["rows"],
                source["rows_per_epoch"] if source["role"] == "training" else "",
            )
            for source in sources
        ],
        empty="",
    )


def _print_rows(report: dict[str, Any]) -> None:
    tokens, too_long = report["tokens"] or {}, report["too_long"]
    print_members(
        {
            "format": report["format"],
            "read": report["rows_read"],
            "kept": report["rows"],
            "training": report["training_rows"],
            "validation": report["validation_rows"],
            "tokens": tokens.get("total"),
            "learnt": report["trained_tokens"] if tokens else None,
            "too long": too_long
            and f"{too_long['rows']} rows, the longest {too_long['longest_tokens']} tokens "
            f"of {too_long['limit_tokens']}",
            "duplicates": _pairs(report["duplicates"], report["duplicate_rows"]),
            "in both sets": _pairs(report["overlap"], report["overlap_rows"]),
        }
    )


def _pairs(count: int, rows: list[dict[str, Any]]) -> str | None:
    if not count:
        return None
    shown = ", ".join(
        f"{_place(row.get('dataset'), row['line'])} = "
        f"{_place(row.get('same_as_dataset'), row['same_as_line'])}"
        for row in rows
    )
    return f"{count} (lines {shown}{', …' if count > len(rows) else ''})"


def _place(dataset: str | None, line: int) -> str:
    return f"{dataset}:{line}" if dataset else str(line)


def _print_histogram(buckets: list[dict[str, Any]]) -> None:
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    most = max(max(bucket["rows"], bucket["rows_by_trained"]) for bucket in buckets)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tokens", "rows", "", "by learnt", ""):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for bucket in buckets:
        until = f"–{bucket['to_tokens'] - 1}" if bucket["to_tokens"] else " and more"
        cells: list[Any] = [f"{bucket['from_tokens']}{until}"]
        for name in ("rows", "rows_by_trained"):
            cells += [str(bucket[name]), Bar(most, 0, bucket[name], width=_BAR_WIDTH)]
        table.add_row(*cells)
    # Elsewhere than on a terminal the width is a guess, which would cut the bars.
    width = None if sys.stdout.isatty() else _WIDTH
    Console(markup=False, highlight=False, width=width).print(table)


def _print_marked(marked: str, spans: list[list[int]]) -> None:
    """Print the text with its learnt parts in colour, or in brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        typer.echo(_bracketed(marked, spans))
        return
    text = Text(marked)
    for start, end in spans:
        text.stylize("bold green", start, end)
    console.print(text)


def _bracketed(text: str, spans: list[list[int]]) -> str:
    parts, last = [], 0
    for start, end in spans:
        parts += [text[last:start], "⟦", text[start:end], "⟧"]
        last = end
    return "".join([*parts, text[last:]])


def _print_estimate(report: dict[str, Any], estimate: dict[str, Any]) -> None:
    def known(name: str, reason: str, show: Callable[[float], str]) -> str:
        value = estimate.get(name)
        return f"about {show(value)}" if value is not None else f"unknown: {estimate.get(reason)}"

    speed = estimate.get("tokens_per_second")
    print_members(
        {
            "steps": report["steps"],
            "tokens per epoch": report["tokens_per_epoch"],
            "tokens in all": report["total_tokens"],
            "device": estimate.get("device"),
            "time": known("seconds", "seconds_reason", show_seconds),
            "from": speed and f"{speed} tokens/s in the last {estimate['measured_jobs']} jobs",
            "memory": known("peak_memory_bytes", "memory_reason", show_bytes),
        }
    )
