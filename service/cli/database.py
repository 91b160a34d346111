"""`tunesmith db`: the schema of the database."""

from __future__ import annotations

from typing import Annotated

import typer

from core.errors import InvalidInput
from service.cli.local import reachable
from service.cli.output import Json, print_json
from service.cli.settings import DataDir, load_settings

app = typer.Typer(help="Create, change and check the database's schema.", no_args_is_help=True)


@app.command("upgrade")
def upgrade(
    revision: Annotated[str, typer.Argument(metavar="[REVISION]")] = "head",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Bring the schema to a revision, the newest by default."""
    import migrations

    url = load_settings(data_dir).resolved_database_url
    with _known_revision(), reachable():
        migrations.upgrade(url, revision)
    _print_current(url, as_json=as_json)


@app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="`base` removes all tables, `-1` is one step.")],
    data_dir: DataDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Take the schema back to a revision; data of what is removed is lost."""
    import migrations

    url = load_settings(data_dir).resolved_database_url
    if not yes:
        typer.confirm(
            "Data of removed tables and columns will be lost. Go on?", abort=True, err=True
        )
    with _known_revision(), reachable():
        migrations.downgrade(url, revision)
    _print_current(url, as_json=as_json)


@app.command("current")
def current(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show the schema's revision and the newest one."""
    _print_current(load_settings(data_dir).resolved_database_url, as_json=as_json)


@app.command("check")
def check(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Compare the schema with what this version expects; exit 1 if they differ."""
    import migrations

    url = load_settings(data_dir).resolved_database_url
    with reachable():
        present, newest = migrations.current(url), migrations.head()
        differences = migrations.check(url) if present == newest else []
    agrees = present == newest and not differences
    if as_json:
        print_json({"ok": agrees, "current": present, "head": newest, "differences": differences})
    elif present != newest:
        typer.echo(f"at {present or 'nothing'}, newest is {newest}; run `tunesmith db upgrade`")
    else:
        for difference in differences:
            typer.echo(difference)
        typer.echo("the schema differs" if differences else f"at {present}, as expected")
    if not agrees:
        raise typer.Exit(1)


def _print_current(url: str, *, as_json: bool) -> None:
    import migrations

    with reachable():
        present, newest = migrations.current(url), migrations.head()
    if as_json:
        print_json({"current": present, "head": newest})
    else:
        typer.echo(f"{present or 'empty'}{' (newest)' if present == newest else f' of {newest}'}")


class _known_revision:  # noqa: N801 (reads like the context manager it is)
    """Turns Alembic's complaint about a revision into ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from alembic.util import CommandError

        if isinstance(error, CommandError):
            raise InvalidInput(
                str(error),
                code="unknown_revision",
                hint="`tunesmith db current` shows where the database is.",
            ) from error
