"""The command line: runs the parts of the service and speaks to a running one over HTTP.

Owns arguments, output and exit codes (0 done, 1 refused or failed, 2 usage). Domain modules are
imported inside the commands, so that `tunesmith --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from core.errors import TunesmithError
from service.cli import (
    adapters,
    database,
    datasets,
    doctor,
    generate,
    healthy,
    housekeeping,
    jobs,
    keys,
    models,
    processes,
    projects,
    webhooks,
)
from service.cli.output import print_error

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune small adapters and serve them all from one base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
processes.register(app)
doctor.register(app)
app.add_typer(healthy.app, name="healthy")
app.add_typer(database.app, name="db")
app.add_typer(keys.app, name="keys")
app.add_typer(projects.app, name="projects")
app.add_typer(models.app, name="models")
app.add_typer(datasets.app, name="datasets")
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(webhooks.app, name="webhooks")
generate.register(app)
housekeeping.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from service.version import service_version

        typer.echo(f"tunesmith {service_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status.

    Args:
        arguments: What follows the program's name; taken from the process by default.

    Raises:
        SystemExit: Always.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tunesmith")
    except TunesmithError as error:
        print_error(error)
        sys.exit(1)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; flushing at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
