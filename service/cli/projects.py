"""`tunesmith projects`: projects and their quotas, straight in the database of this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.cli.local import open_database
from service.cli.output import Json, print_json, print_table, show_time
from service.cli.settings import DataDir, load_settings

app = typer.Typer(help="List projects and set their quotas.", no_args_is_help=True)

_MEANING = "0 is no limit, `default` the service's."
_COLUMNS = ("queued_jobs", "running_jobs", "stored_rows", "stored_bytes")


@app.command("list")
def list_projects(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List projects with their quotas; `*` marks those that differ from the default."""
    from core import quotas

    settings = load_settings(data_dir)
    with open_database(settings) as database, database.session() as session:
        found = [entry.model_dump(mode="json") for entry in quotas.list_projects(session, settings)]
    if as_json:
        print_json(found)
        return
    print_table(
        ("name", *(name.replace("_", " ") for name in _COLUMNS), "created"),
        [
            (
                project["name"],
                *(_limit(project, name) for name in _COLUMNS),
                show_time(project["created_at"]),
            )
            for project in found
        ],
        empty="No projects.",
    )


@app.command("quota")
def set_quota(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `projects list` shows it.")],
    queued_jobs: Annotated[
        str | None, typer.Option(metavar="N", help=f"Jobs that may wait. {_MEANING}")
    ] = None,
    running_jobs: Annotated[
        str | None, typer.Option(metavar="N", help=f"Jobs in training at once. {_MEANING}")
    ] = None,
    stored_rows: Annotated[
        str | None, typer.Option(metavar="N", help=f"Rows of all data sets. {_MEANING}")
    ] = None,
    stored_bytes: Annotated[
        str | None, typer.Option(metavar="N", help=f"Data sets, adapters and exports. {_MEANING}")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Give a project quotas of its own; those not named stay as they are."""
    from core import quotas

    given = {
        "queued_jobs": queued_jobs,
        "running_jobs": running_jobs,
        "stored_rows": stored_rows,
        "stored_bytes": stored_bytes,
    }
    values: dict[quotas.QuotaName, int | None] = {
        quota: _parse(quota, given[quota] or "")
        for quota in quotas.QUOTA_NAMES
        if given[quota] is not None
    }
    settings = load_settings(data_dir)
    with open_database(settings) as database, database.session(write=True) as session:
        project = quotas.set_quotas(session, settings, name, values).model_dump(mode="json")
    if as_json:
        print_json(project)
        return
    typer.echo(f"{name}  " + "  ".join(f"{quota} {_limit(project, quota)}" for quota in _COLUMNS))


def _parse(quota: str, text: str) -> int | None:
    if text == "default":
        return None
    if not text.isdecimal():
        option = "--" + quota.replace("_", "-")
        raise typer.BadParameter(f"{option} {text!r} is neither a number nor `default`")
    return int(text)


def _limit(project: dict[str, Any], quota: str) -> str:
    value = project["quotas"][quota]
    mark = "*" if quota in project["own"] else ""
    return f"{'no limit' if value is None else value}{mark}"
