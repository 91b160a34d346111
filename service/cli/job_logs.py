"""`tunesmith jobs logs`: what a job's trainer wrote."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from service.cli.client import DEFAULT_URL, Key, Url, connect
from service.cli.job_control import Id
from service.cli.output import Json, note, show_time

# Members of a structured line that are shown in front, or that every line of a job has alike.
_FRONT = frozenset({"timestamp", "level", "event"})
_ALIKE = frozenset({"job_id", "attempt", "process", "logger"})


def register(app: typer.Typer) -> None:
    """Add the command to `tunesmith jobs`."""
    app.command("logs")(logs)


def logs(
    job_id: Id,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, max=10_000, help="At most so many, the last.")
    ] = 200,
    attempt: Annotated[int | None, typer.Option(min=0, help="Only lines of this attempt.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show the last lines that a job's trainer wrote; --json prints one line an object."""
    params = {"limit": lines, **({} if attempt is None else {"attempt": attempt})}
    path = f"/jobs/{job_id}/logs"
    with connect(url, key) as service:
        if not follow:
            page = service.call("GET", path, params=params)
            for line in page["data"]:
                _print_line(line, as_json=as_json)
            if not page["data"] and not as_json:
                note("No lines." if page["complete"] else "No lines yet.")
            return
        with service.events("GET", path, params=params) as stream:
            for event in stream:
                if event.id:
                    _print_line(json.loads(event.data), as_json=as_json)


def show_line(text: str) -> str:
    """Return a structured line as a person reads it; any other line as it is."""
    try:
        members = json.loads(text)
    except ValueError:
        return text
    if not isinstance(members, dict) or not members.keys() >= _FRONT:
        return text
    fields = " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in members.items()
        if name not in _FRONT | _ALIKE and name != "exception"
    )
    shown = (
        f"{show_time(members['timestamp'])}  {members['level']:<7}  {members['event']}  {fields}"
    )
    trace = members.get("exception")
    return shown.rstrip() + (f"\n{trace}" if trace else "")


def _print_line(line: dict[str, Any], *, as_json: bool) -> None:
    typer.echo(json.dumps(line, ensure_ascii=False) if as_json else show_line(line["text"]))
