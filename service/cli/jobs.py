"""`tunesmith jobs`: submit fine-tuning jobs and watch them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import InvalidInput, TunesmithError
from service.cli import job_control, job_history, job_logs, job_validation
from service.cli.client import DEFAULT_URL, Key, Limit, ServiceClient, Url, connect
from service.cli.files import read_json
from service.cli.follow import check_succeeded, describe_stage, follow_job
from service.cli.job_control import Id
from service.cli.output import (
    Json,
    note,
    print_json,
    print_members,
    print_table,
    show_seconds,
    show_time,
)

app = typer.Typer(help="Submit fine-tuning jobs, watch and move them.", no_args_is_help=True)
Wait = Annotated[
    bool, typer.Option("--wait", "-w", help="Wait until the job ends; exit 1 unless it succeeds.")
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Like --wait, with live progress on a terminal.")
]
SpecFile = Annotated[Path, typer.Argument(help="JobSpec as JSON; `-` reads stdin.")]
DatasetId = Annotated[str | None, typer.Option(help="Id of the data set to train on.")]
Upload = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="File to upload and train on instead."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field, such as training.epochs=2; may be given several times.",
    ),
]


@app.command("submit")
def submit(
    file: SpecFile,
    dataset: DatasetId = None,
    upload: Upload = None,
    assignments: Assignments = None,
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
    spec = _complete_spec(file, dataset, upload, assignments)
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


@app.command("validate")
def validate(
    file: SpecFile,
    dataset: DatasetId = None,
    upload: Upload = None,
    assignments: Assignments = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Check a spec and all its rows without training; exit 1 if a job would be refused.

    An uploaded file stays as a data set.
    """
    spec = _complete_spec(file, dataset, upload, assignments)
    with connect(url, key) as service:
        if upload is not None:
            spec["dataset"] = service.upload("/datasets", upload)["id"]
            note(f"data set {spec['dataset']}")
        found = job_validation.validate(service, spec)
    if as_json:
        print_json(found)
    elif found["report"] is not None:
        job_validation.print_validation(found)
    if found["report"] is None:
        error = found["error"] or {}
        raise TunesmithError(
            error.get("message", "there is no report"),
            code=error.get("code", "failed"),
            hint=error.get("hint"),
        )
    if not found["valid"]:
        raise typer.Exit(1)


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


def _complete_spec(
    file: Path, dataset: str | None, upload: Path | None, assignments: list[str] | None
) -> dict[str, Any]:
    if dataset is not None and upload is not None:
        raise typer.BadParameter("give either --dataset or --upload")
    spec = read_spec(file)
    if dataset is not None or upload is not None:
        _replace_rows(spec, "dataset", dataset or "")
    for assignment in assignments or []:
        assign(spec, assignment)
    return spec


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

    A data set takes the place of all that the spec's rows came from before.

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
    if path in ("dataset", "datasets", "rows"):
        _replace_rows(spec, path, value)
        return
    target = spec
    for name in names[:-1]:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise InvalidInput(
                f"--set {assignment!r}: {name} is no object", code="invalid_assignment"
            )
    target[names[-1]] = value


def _replace_rows(spec: dict[str, Any], name: str, source: Any) -> None:
    # A split is of the data set that it came with.
    for replaced in ("split", "dataset", "datasets", "rows"):
        spec.pop(replaced, None)
    spec[name] = source


def _finish(service: ServiceClient, job_id: str, *, live: bool, as_json: bool) -> None:
    job = follow_job(service, job_id, live=live)
    if as_json:
        print_json(job)
    check_succeeded(job)
    if not as_json:
        version = job["version"]
        typer.echo(f"{version['name']}@{version['version']}  {version['digest'][:12]}")
        if version["quarantine"]:
            note(f"quarantined: {version['quarantine']}")


def _print_job(job: dict[str, Any]) -> None:
    version, error = job["version"], job["error"] or {}
    print_members(
        {
            "id": job["id"],
            "status": describe_stage(job),
            "steps": _steps(job) or None,
            "starts in": show_seconds(job["progress"]["starts_in_seconds"]) or None,
            "left": show_seconds(job["progress"]["eta_seconds"]) or None,
            "waits because": job["progress"]["waiting_reason"],
            "priority": job["priority"] or None,
            "adapter": f"{version['name']}@{version['version']}" if version else job["adapter"],
            "digest": version and version["digest"],
            "quarantined": version and version["quarantine"],
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


def _steps(job: dict[str, Any]) -> str:
    progress = job["progress"]
    return f"{progress['step']}/{progress['total_steps']}" if progress["total_steps"] else ""


job_history.register(app)
job_logs.register(app)
job_control.register(app)
