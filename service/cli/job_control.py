"""`tunesmith jobs`: what can be done to a job: cancel, pause, resume, retry, reorder, remove."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.cli.client import DEFAULT_URL, Key, Url, connect
from service.cli.output import Json, print_json

Id = Annotated[str, typer.Argument(metavar="ID", help="As `jobs list` shows it.")]
_STOPPING = {"cancel": "stopping", "pause": "pausing"}


def register(app: typer.Typer) -> None:
    """Add the commands to `tunesmith jobs`."""
    app.command("cancel")(cancel)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("retry")(retry)
    app.command("priority")(set_priority)
    app.command("rm")(remove)


def cancel(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Ask a job to stop; a running one does so after its present step."""
    _change(job_id, "cancel", url, key, as_json=as_json)


def pause(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Let a job rest; a running one saves a checkpoint first."""
    _change(job_id, "pause", url, key, as_json=as_json)


def resume(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Let a paused job go on from its checkpoint."""
    _change(job_id, "resume", url, key, as_json=as_json)


def retry(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Start a failed or cancelled job again; it goes on from its checkpoint."""
    _change(job_id, "retry", url, key, as_json=as_json)


def set_priority(
    job_id: Id,
    priority: Annotated[
        int,
        typer.Argument(metavar="N", min=-100, max=100, help="Higher runs first; `--` before -N."),
    ],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Change the priority of a job that has not ended."""
    with connect(url, key) as service:
        job = service.call("PATCH", f"/jobs/{job_id}", json={"priority": priority})
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job['id']}  priority {job['priority']}")


def remove(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Remove a job that has ended; its adapter stays."""
    with connect(url, key) as service:
        service.call("DELETE", f"/jobs/{job_id}")
    if as_json:
        print_json({"id": job_id, "removed": True})
    else:
        typer.echo(f"removed {job_id}")


def _change(job_id: str, action: str, url: str, key: str, *, as_json: bool) -> None:
    with connect(url, key) as service:
        job: dict[str, Any] = service.call("POST", f"/jobs/{job_id}/{action}")
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job['id']}  {_STOPPING.get(job['stop_requested'], job['status'])}")
