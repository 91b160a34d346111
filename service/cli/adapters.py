"""`tunesmith adapters`: the registry of trained and imported adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import InvalidInput
from service.cli.client import DEFAULT_URL, Key, Limit, ServiceClient, Url, connect
from service.cli.exports import export
from service.cli.output import (
    Json,
    print_json,
    print_members,
    print_table,
    show_bytes,
    show_time,
)

_ALL = 1_000_000_000

app = typer.Typer(help="Look at, move and remove adapters.", no_args_is_help=True)
app.command("export")(export)
Name = Annotated[str, typer.Argument(metavar="NAME", help="As `adapters list` shows it.")]
Version = Annotated[int | None, typer.Option("--version", min=1, help="One version of it.")]


@app.command("list")
def list_adapters(
    limit: Limit = 50, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False
) -> None:
    """List adapters, newest first."""
    with connect(url, key) as service:
        adapters = service.list("/adapters", limit)
    if as_json:
        print_json(adapters)
        return
    print_table(
        ("name", "latest", "base model", "aliases", "created"),
        [
            (
                row["name"],
                row["latest"],
                row["base_model"],
                show_aliases(row["aliases"]),
                show_time(row["created_at"]),
            )
            for row in adapters
        ],
        empty="No adapters. `tunesmith jobs submit FILE` trains one.",
    )


@app.command("show")
def show(
    name: Name,
    version: Version = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Show an adapter with its versions, or one version with its provenance."""
    with connect(url, key) as service:
        if version is not None:
            found: dict[str, Any] = service.call("GET", f"/adapters/{name}/versions/{version}")
            versions: list[dict[str, Any]] = []
        else:
            found = service.call("GET", f"/adapters/{name}")
            versions = service.list(f"/adapters/{name}/versions", limit=_ALL)
    if as_json:
        print_json(found if version is not None else {**found, "versions": versions})
        return
    print_members(
        {
            "name" if label == "adapter" else label: value
            for label, value in found.items()
            if label not in {"manifest", "versions", "created_at"}
        }
        | {"created": show_time(found["created_at"])}
    )
    if version is None:
        typer.echo()
        print_table(
            ("version", "digest", "size", "origin", "job", "created", "state"),
            [
                (
                    row["version"],
                    row["digest"][:12],
                    show_bytes(row["bytes"]),
                    row["origin"],
                    row["job_id"],
                    show_time(row["created_at"]),
                    f"quarantined: {row['quarantine']}" if row["quarantine"] else "",
                )
                for row in versions
            ],
            empty="No versions.",
        )


@app.command("download")
def download(
    name: Name,
    version: Version = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Target file; NAME-VERSION.tar.gz.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Save a version, the latest by default, as a tar.gz of its PEFT directory."""
    with connect(url, key) as service:
        if version is None:
            version = service.call("GET", f"/adapters/{name}")["latest"]
            if version is None:
                raise InvalidInput(
                    f"{name} has no latest version",
                    code="no_latest_version",
                    hint="Name one with --version.",
                )
        target = output or Path(f"{name}-{version}.tar.gz")
        if target.exists() and not force:
            raise InvalidInput(
                f"{target} exists already", code="target_exists", hint="Replace it with --force."
            )
        # Written beside the target first: a download that breaks off leaves no half file.
        partial = target.with_name(f"{target.name}.part")
        try:
            with (
                service.stream("GET", f"/adapters/{name}/versions/{version}/download") as response,
                partial.open("wb") as stream,
            ):
                for chunk in response.iter_bytes():
                    stream.write(chunk)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    size = target.stat().st_size
    if as_json:
        print_json({"name": name, "version": version, "path": str(target), "bytes": size})
    else:
        typer.echo(f"{name}@{version} → {target} ({show_bytes(size)})")


@app.command("import")
def import_adapter(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to publish it under.")],
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A PEFT LoRA directory as tar.gz."),
    ],
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Needed where several are configured.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Publish a foreign adapter, through the same gates as a trained one."""
    with connect(url, key) as service:
        base_model = base_model or only_base_model(service)
        version = service.upload("/adapters/import", file, name=name, base_model=base_model)
    if as_json:
        print_json(version)
    else:
        typer.echo(f"{version['adapter']}@{version['version']}  {version['digest'][:12]}")


@app.command("alias")
def move_alias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="For example `latest`.")],
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Point an alias at a version: promote, or roll back."""
    with connect(url, key) as service:
        moved = service.call("PUT", f"/adapters/{name}/aliases/{alias}", json={"version": version})
    if as_json:
        print_json(moved)
    else:
        typer.echo(f"{name}:{alias} → {name}@{version}")


@app.command("release")
def release(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Let aliases point at a quarantined version."""
    with connect(url, key) as service:
        released = service.call("POST", f"/adapters/{name}/versions/{version}/release")
    if as_json:
        print_json(released)
    else:
        typer.echo(f"released {name}@{version}; `tunesmith adapters alias` moves an alias to it")


@app.command("rm")
def remove(
    name: Name,
    version: Version = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even where an alias points at it.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Remove an adapter, or one version of it."""
    path = f"/adapters/{name}" + ("" if version is None else f"/versions/{version}")
    with connect(url, key) as service:
        service.call("DELETE", path, params={"force": "true"} if force else {})
    if as_json:
        print_json({"name": name, "version": version, "removed": True})
    else:
        typer.echo(f"removed {name}" + ("" if version is None else f"@{version}"))


def only_base_model(service: ServiceClient) -> str:
    """Return the name of the one base model that is configured.

    Raises:
        InvalidInput: Code `base_model_needed`; there are none or several.
    """
    names = [model["name"] for model in service.call("GET", "/models")["data"]]
    if len(names) == 1:
        return str(names[0])
    raise InvalidInput(
        "name the base model that the adapter was trained on",
        code="base_model_needed",
        hint=f"Give --base-model, one of: {', '.join(names)}." if names else None,
    )


def show_aliases(aliases: dict[str, int]) -> str:
    """Return aliases such as `latest=3 stable=2`."""
    return " ".join(f"{alias}={version}" for alias, version in sorted(aliases.items()))
