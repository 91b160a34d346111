"""`serve` runs the whole service; `api`, `engine` and `worker` run one part of it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from service.cli.output import Json
from service.cli.settings import DataDir, load_settings

if TYPE_CHECKING:
    from core.config import Settings

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the main application."""
    app.command("serve")(serve)
    app.command("api")(api)
    app.command("engine")(engine)
    app.command("worker")(worker)


def serve(
    data_dir: DataDir = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_workers: Annotated[int, typer.Option("--api-workers", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    from service.serving import run_service

    raise typer.Exit(
        run_service(
            load_settings(data_dir),
            host=host,
            port=port,
            api_workers=api_workers,
            as_json=as_json,
        )
    )


def api(
    data_dir: DataDir = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
) -> None:
    """Run the HTTP API alone."""
    from service import server
    from service.serving import check_exposure, is_loopback

    settings = load_settings(data_dir)
    if settings.auth == "keys" and not is_loopback(host):
        # Whether there is a key can only be told once the database is there.
        from migrations.waiting import wait_for_schema

        wait_for_schema(settings.resolved_database_url)
    check_exposure(settings, host)
    raise typer.Exit(server.run(settings, host=host, port=port, workers=workers))


def engine(
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="unix:/PATH, or http://HOST:PORT with a shared secret; the local socket.",
        ),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Run the inference engine alone."""
    _become(load_settings(data_dir), "engine", *(["--listen", listen] if listen else []))


def worker(
    queue: Annotated[
        Literal["train", "light"],
        typer.Option("--queue", help="train: jobs; light: validation and other short work."),
    ],
    data_dir: DataDir = None,
) -> None:
    """Run one worker."""
    _become(load_settings(data_dir), "worker", "--queue", queue)


def _become(settings: Settings, module: str, *arguments: str) -> NoReturn:
    """Replace this process by a module of the project, which may not be imported from here."""
    environment = {**os.environ, **settings.environment()}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
