"""`tunesmith doctor`: looks for what keeps the service from working on this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from service.cli.output import Json, print_json
from service.cli.settings import DataDir, load_settings

_MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}


def register(app: typer.Typer) -> None:
    """Add the command to the main application."""
    app.command("doctor")(doctor)


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all files of the base models again.")
    ] = False,
    port: Annotated[int, typer.Option(help="The port the service shall have.")] = 8000,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check this machine and its service; exit 1 if something must be repaired."""
    from service.doctor import examine

    findings = list(examine(load_settings(data_dir), port=port, deep=deep))
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        print_json(
            {"ok": not failed, "checks": [dataclasses.asdict(finding) for finding in findings]}
        )
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{_MARKS[finding.status]} {finding.name:<{width}}  {finding.detail}")
            if finding.hint:
                typer.echo(f"  {'':<{width}}  → {finding.hint}")
    if failed:
        raise typer.Exit(1)
