"""`tunesmith keys`: API keys, straight in the database of this machine's service."""

from __future__ import annotations

from typing import Annotated

import typer

from core.principal import DEFAULT_PROJECT_NAME, SCOPES
from service.cli.local import open_database
from service.cli.output import Json, note, print_json, print_table, show_time
from service.cli.settings import DataDir, load_settings

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What you call the key.")],
    project: Annotated[
        str, typer.Option(help="Whose objects it reaches; made if it is new.")
    ] = DEFAULT_PROJECT_NAME,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help=f"One of {', '.join(SCOPES)}; may be given several times."),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Create a key, with all of train, generate and read by default, and show it once."""
    from core import auth

    with (
        open_database(load_settings(data_dir)) as database,
        database.session(write=True) as session,
    ):
        key, secret = auth.create_key(session, project, name, scopes or ["train", "generate"])
    if as_json:
        print_json({**key.model_dump(mode="json"), "key": secret})
        return
    typer.echo(secret)
    note(
        f"{key.id}: project {key.project}, scopes {', '.join(key.scopes)}. "
        "This is the only time the key is shown."
    )


@app.command("list")
def list_keys(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List keys, without their secrets."""
    from core import auth

    with open_database(load_settings(data_dir)) as database, database.session() as session:
        keys = [key.model_dump(mode="json") for key in auth.list_keys(session)]
    if as_json:
        print_json(keys)
        return
    print_table(
        ("id", "project", "name", "scopes", "created", "revoked"),
        [
            (
                key["id"],
                key["project"],
                key["name"],
                ",".join(key["scopes"]),
                show_time(key["created_at"]),
                show_time(key["revoked_at"]),
            )
            for key in keys
        ],
        empty="No keys. `tunesmith keys create NAME` makes one.",
    )


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a key invalid at once."""
    from core import auth

    with (
        open_database(load_settings(data_dir)) as database,
        database.session(write=True) as session,
    ):
        key = auth.revoke_key(session, key_id)
    if as_json:
        print_json(key.model_dump(mode="json"))
    else:
        typer.echo(f"revoked {key.id} ({key.name})")
