"""`tunesmith jobs`: what a job has done so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.client import DEFAULT_URL, Key, Url, connect
from service.cli.job_control import Id
from service.cli.output import (
    Json,
    print_json,
    print_table,
    show_bytes,
    show_time,
)


def register(app: typer.Typer) -> None:
    """Add the commands to `tunesmith jobs`."""
    app.command("events")(events)
    app.command("metrics")(metrics)
    app.command("report")(report)
    app.command("checkpoints")(checkpoints)


def events(
    job_id: Id,
    after: Annotated[int, typer.Option(min=0, help="Only events behind this number.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show what happened to a job, oldest first; --json prints one event a line."""
    with connect(url, key) as service:
        if follow:
            headers = {"Last-Event-ID": str(after)}
            with service.events("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
                for event in stream:
                    if event.id:
                        _print_event(
                            {**json.loads(event.data), "id": int(event.id)}, as_json=as_json
                        )
            return
        while True:
            page = service.call("GET", f"/jobs/{job_id}/events", params={"after": after})
            for entry in page["data"]:
                _print_event(entry, as_json=as_json)
                after = entry["id"]
            if page["next_cursor"] is None or not page["data"]:
                return


def metrics(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Show the measurements of a job's training, oldest first."""
    with connect(url, key) as service:
        rows = service.list(f"/jobs/{job_id}/metrics", limit=1_000_000_000)
    if as_json:
        print_json(rows)
        return
    names = (
        "attempt",
        "step",
        "epoch",
        "loss",
        "eval_loss",
        "accuracy",
        "learning_rate",
        "grad_norm",
    )
    print_table(
        (*names, "tokens/s"),
        [
            (*(_number(row[name]) for name in names), _number(row["tokens_per_second"], "{:.0f}"))
            for row in rows
        ],
        empty="No measurements yet.",
    )


def report(
    job_id: Id,
    html: Annotated[
        Path | None, typer.Option("--html", help="Save the page instead, to open in a browser.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show answers and figures before and after training."""
    with connect(url, key) as service:
        if html is not None:
            with service.stream("GET", f"/jobs/{job_id}/report", params={"format": "html"}) as page:
                html.write_bytes(page.read())
            typer.echo(str(html))
            return
        found = service.call("GET", f"/jobs/{job_id}/report")
        job = None if as_json else service.call("GET", f"/jobs/{job_id}")
    if job is None:
        print_json(found)
        return
    from service.cli.report import print_report

    print_report(job, found)


def checkpoints(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """List the checkpoints of a job that are kept, the newest first."""
    with connect(url, key) as service:
        found = service.call("GET", f"/jobs/{job_id}/checkpoints")["data"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("step", "attempt", "size", "created", "state"),
        [
            (
                row["step"],
                row["attempt"],
                show_bytes(row["bytes"]),
                show_time(row["created_at"]),
                "usable" if row["usable"] else f"unusable: {row['reason']}",
            )
            for row in found
        ],
        empty="No checkpoints.",
    )


def _print_event(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(event, ensure_ascii=False))
        return
    data = json.dumps(event["data"], ensure_ascii=False) if event["data"] else ""
    typer.echo(f"{event['id']:>4}  {show_time(event['created_at'])}  {event['type']}  {data}")


def _number(value: float | None, form: str = "{:.4g}") -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else form.format(value)
