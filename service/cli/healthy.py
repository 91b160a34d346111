"""`tunesmith healthy`: probes for health checks of containers and services; exit 0 or 1."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from service.cli.local import reachable
from service.cli.output import Json, print_json
from service.cli.settings import DataDir, load_settings

app = typer.Typer(help="Ask one process whether it is well; exit 1 if not.", no_args_is_help=True)


@app.command("api")
def api(
    host: Annotated[str, typer.Option(help="Address that it listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    ready: Annotated[
        bool, typer.Option("--ready", help="Ask whether the whole service can work, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask the API whether it answers."""
    from service import health

    _tell(health.check_api(host, port, ready=ready), as_json=as_json)


@app.command("engine")
def engine(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="unix:/PATH or http://HOST:PORT; the first of ENGINE_URLS, or the local socket.",
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Ask an engine whether it takes requests."""
    from service import health

    settings = load_settings(data_dir)
    _tell(health.check_engine(settings, address or settings.engine_addresses[0]), as_json=as_json)


@app.command("worker")
def worker(
    queue: Annotated[
        Literal["train", "light"] | None, typer.Option("--queue", help="Of one queue only.")
    ] = None,
    pid: Annotated[int | None, typer.Option(help="Of one process only.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Ask the database whether a worker of this host has reported itself lately."""
    from service import health

    settings = load_settings(data_dir)
    with reachable():
        found = health.check_worker(settings, queue, pid)
    _tell(found, as_json=as_json)


def _tell(found: str, *, as_json: bool) -> None:
    print_json({"ok": True, "detail": found}) if as_json else typer.echo(found)
