"""`tunesmith adapters export`: asks for a whole model, follows it and saves its file."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import InvalidInput, TunesmithError
from service.cli.client import DEFAULT_URL, Key, ServiceClient, Url, connect
from service.cli.output import Json, print_json, show_bytes

_LOOK_SECONDS = 1.0


class Format(StrEnum):
    """What an export is."""

    MERGED = "merged"
    GGUF = "gguf"


class Dtype(StrEnum):
    """Of an export's weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def export(
    adapter: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="The latest version by default.")
    ],
    format: Annotated[  # noqa: A002 (named as the option)
        Format, typer.Option("--format", help="A tar of a model directory, or one GGUF file.")
    ] = Format.MERGED,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Of the weights; q8_0 in GGUF only.")
    ] = Dtype.FP16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Target file; NAME-VERSION-DTYPE.tar.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Merge a version into its base model and save the whole model."""
    name, _, wanted = adapter.partition("@")
    if wanted and not wanted.isdecimal():
        raise InvalidInput(
            f"{wanted!r} is no version", code="invalid_version", hint="For example bot@3."
        )
    with connect(url, key) as service:
        version = int(wanted) if wanted else service.call("GET", f"/adapters/{name}")["latest"]
        if version is None:
            raise InvalidInput(
                f"{name} has no latest version",
                code="no_latest_version",
                hint=f"Name one, such as {name}@1.",
            )
        suffix = "gguf" if format is Format.GGUF else "tar"
        target = output or Path(f"{name}-{version}-{dtype.value}.{suffix}")
        if target.exists() and not force:
            raise InvalidInput(
                f"{target} exists already", code="target_exists", hint="Replace it with --force."
            )
        path = f"/adapters/{name}/versions/{version}/exports"
        asked = service.call("POST", path, json={"format": format.value, "dtype": dtype.value})
        done = _follow(service, f"{path}/{asked['id']}", asked, quiet=as_json)
        _save(service, f"{path}/{asked['id']}/download", target)
    if as_json:
        print_json({**done, "path": str(target)})
    else:
        typer.echo(f"{name}@{version} → {target} ({show_bytes(done['bytes'])})")


def _follow(
    service: ServiceClient, path: str, found: dict[str, Any], *, quiet: bool
) -> dict[str, Any]:
    shown = None
    while found["status"] in {"queued", "running"}:
        if found["status"] != shown and not quiet:
            shown = found["status"]
            typer.echo(f"{found['id']}  {shown}", err=True)
        time.sleep(_LOOK_SECONDS)
        found = service.call("GET", path)
    if found["status"] == "failed":
        error = found["error"] or {}
        raise TunesmithError(
            str(error.get("message", "the export failed")),
            code=str(error.get("code", "export_failed")),
            hint=error.get("hint"),
        )
    return found


def _save(service: ServiceClient, path: str, target: Path) -> None:
    # Written beside the target first: a download that breaks off leaves no half file.
    partial = target.with_name(f"{target.name}.part")
    try:
        with service.stream("GET", path) as response, partial.open("wb") as stream:
            for chunk in response.iter_bytes():
                stream.write(chunk)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
