"""`tunesmith jobs`: submit fine-tuning jobs and watch them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import InvalidInput
from service.cli.client import DEFAULT_URL, Key, Limit, ServiceClient, Url, connect
from service.cli.files import read_json
from service.cli.follow import check_succeeded, describe_stage, follow_job
from service.cli.output import (
    Json,
    print_json,
    print_members,
    print_table,
    show_seconds,
    show_time,
)

app = typer.Typer(help="Submit fine-tuning jobs and watch them.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="As `jobs list` shows it.")]
Wait = Annotated[
    bool, typer.Option("--wait", "-w", help="Wait until the job ends; exit 1 unless it succeeds.")
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Like --wait, with live progress on a terminal.")
]


@app.command("submit")
def submit(
    file: Annotated[
        Path,
        typer.Argument(help="JobSpec as JSON; `-` reads stdin."),
    ],
    dataset: Annotated[str | None, typer.Option(help="Id of the data set to train on.")] = None,
    upload: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File to upload and train on instead."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Change a field, such as training.epochs=2; may be given several times.",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option("--idempotency-key", help="The same key and spec never make a second job."),
    ] = None,
    wait: Wait = False,
    follow: Follow = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Submit a job and print its id."""
    if dataset is not None and upload is not None:
        raise typer.BadParameter("give either --dataset or --upload")
    spec = read_spec(file)
    if dataset is not None:
        spec["dataset"] = dataset
    for assignment in assignments or []:
        assign(spec, assignment)
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    with connect(url, key) as service:
        if upload is not None:
            spec["dataset"] = service.upload("/datasets", upload)["id"]
        job = service.call("POST", "/jobs", json=spec, headers=headers)
        if wait or follow:
            if not as_json:
                typer.echo(job["id"])
            _finish(service, job["id"], live=follow, as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            typer.echo(job["id"])


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    limit: Limit = 50,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with connect(url, key) as service:
        jobs = service.list("/jobs", limit, status=status)
    if as_json:
        print_json(jobs)
        return
    print_table(
        ("id", "adapter", "base model", "status", "steps", "left", "created"),
        [
            (
                job["id"],
                job["adapter"],
                job["base_model"],
                describe_stage(job),
                _steps(job),
                show_seconds(job["progress"]["eta_seconds"]) if job["status"] == "running" else "",
                show_time(job["created_at"]),
            )
            for job in jobs
        ],
        empty="No jobs. `tunesmith jobs submit FILE` starts one.",
    )


@app.command("show")
def show(
    job_id: Id,
    wait: Wait = False,
    follow: Follow = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show one job, or watch it until it ends."""
    with connect(url, key) as service:
        if wait or follow:
            _finish(service, job_id, live=follow, as_json=as_json)
            return
        job = service.call("GET", f"/jobs/{job_id}")
    print_json(job) if as_json else _print_job(job)


@app.command("events")
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


@app.command("metrics")
def metrics(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Show the measurements of a job's training, oldest first."""
    with connect(url, key) as service:
        rows = service.list(f"/jobs/{job_id}/metrics", limit=1_000_000_000)
    if as_json:
        print_json(rows)
        return
    columns = ("attempt", "step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    print_table(
        (*columns, "tokens/s"),
        [
            (*(_number(row[name]) for name in columns), _number(row["tokens_per_second"], "{:.0f}"))
            for row in rows
        ],
        empty="No measurements yet.",
    )


@app.command("report")
def report(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Show the answers before and after training."""
    with connect(url, key) as service:
        found = service.call("GET", f"/jobs/{job_id}/report")
    if as_json:
        print_json(found)
        return
    for sample in found.get("samples") or []:
        for name, value in sample.items():
            typer.echo(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
        typer.echo()
    print_members({name: value for name, value in found.items() if name != "samples"})


@app.command("cancel")
def cancel(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Ask a job to stop; a running one does so after its present step."""
    with connect(url, key) as service:
        job = service.call("POST", f"/jobs/{job_id}/cancel")
    if as_json:
        print_json(job)
    else:
        typer.echo(f"{job['id']}  {'stopping' if job['status'] == 'running' else job['status']}")


@app.command("rm")
def remove(job_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Remove a job that has ended; its adapter stays."""
    with connect(url, key) as service:
        service.call("DELETE", f"/jobs/{job_id}")
    if as_json:
        print_json({"id": job_id, "removed": True})
    else:
        typer.echo(f"removed {job_id}")


def read_spec(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, or from stdin when the path is `-`.

    Raises:
        InvalidInput: Code `invalid_json`.
    """
    spec = read_json(path)
    if not isinstance(spec, dict):
        raise InvalidInput(f"{path} holds no JSON object", code="invalid_json")
    return spec


def assign(spec: dict[str, Any], assignment: str) -> None:
    """Set a field of a spec from text such as `training.epochs=2`; the value is JSON, else text.

    Raises:
        InvalidInput: Code `invalid_assignment`.
    """
    path, equals, text = assignment.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        raise InvalidInput(
            f"--set {assignment!r} is not PATH=VALUE",
            code="invalid_assignment",
            hint="For example --set training.learning_rate=1e-4.",
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    target = spec
    for name in names[:-1]:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise InvalidInput(
                f"--set {assignment!r}: {name} is no object", code="invalid_assignment"
            )
    target[names[-1]] = value


def _finish(service: ServiceClient, job_id: str, *, live: bool, as_json: bool) -> None:
    job = follow_job(service, job_id, live=live)
    if as_json:
        print_json(job)
    check_succeeded(job)
    if not as_json:
        version = job["version"]
        typer.echo(f"{version['name']}@{version['version']}  {version['digest'][:12]}")


def _print_job(job: dict[str, Any]) -> None:
    version, error = job["version"], job["error"] or {}
    print_members(
        {
            "id": job["id"],
            "status": describe_stage(job),
            "steps": _steps(job) or None,
            "left": show_seconds(job["progress"]["eta_seconds"]) or None,
            "adapter": f"{version['name']}@{version['version']}" if version else job["adapter"],
            "digest": version and version["digest"],
            "base model": job["base_model"],
            "data set": job["dataset"],
            "attempt": job["attempt"],
            "created": show_time(job["created_at"]),
            "started": show_time(job["started_at"]) or None,
            "finished": show_time(job["finished_at"]) or None,
            "metadata": job["metadata"] or None,
            "error": error.get("message"),
            "code": error.get("code"),
            "line": error.get("line"),
            "hint": error.get("hint"),
        }
    )


def _print_event(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(event, ensure_ascii=False))
        return
    data = json.dumps(event["data"], ensure_ascii=False) if event["data"] else ""
    typer.echo(f"{event['id']:>4}  {show_time(event['created_at'])}  {event['type']}  {data}")


def _steps(job: dict[str, Any]) -> str:
    progress = job["progress"]
    return f"{progress['step']}/{progress['total_steps']}" if progress["total_steps"] else ""


def _number(value: float | None, form: str = "{:.4g}") -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else form.format(value)
