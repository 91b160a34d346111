"""`tunesmith datasets`: upload, look at and remove data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.client import DEFAULT_URL, Key, Limit, Url, connect
from service.cli.output import (
    Json,
    print_json,
    print_members,
    print_table,
    show_bytes,
    show_time,
)

app = typer.Typer(help="Upload, look at and remove data sets.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="As `datasets list` shows it.")]


@app.command("upload")
def upload(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, readable=True, help="JSONL, JSON, CSV or Parquet."
        ),
    ],
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Upload a file and print the data set's id."""
    with connect(url, key) as service:
        dataset = service.upload("/datasets", file)
    if as_json:
        print_json(dataset)
    else:
        typer.echo(f"{dataset['id']}  {dataset['rows']} rows, {dataset['format']}")


@app.command("list")
def list_datasets(
    limit: Limit = 50, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False
) -> None:
    """List data sets, newest first."""
    with connect(url, key) as service:
        datasets = service.list("/datasets", limit)
    if as_json:
        print_json(datasets)
        return
    print_table(
        ("id", "file", "format", "rows", "size", "created"),
        [
            (
                row["id"],
                row["filename"],
                row["format"],
                row["rows"],
                show_bytes(row["bytes"]),
                show_time(row["created_at"]),
            )
            for row in datasets
        ],
        empty="No data sets. `tunesmith datasets upload FILE` adds one.",
    )


@app.command("show")
def show(dataset_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Show one data set."""
    with connect(url, key) as service:
        dataset: dict[str, Any] = service.call("GET", f"/datasets/{dataset_id}")
    if as_json:
        print_json(dataset)
    else:
        print_members(
            {
                **dataset,
                "bytes": show_bytes(dataset["bytes"]),
                "created_at": show_time(dataset["created_at"]),
            }
        )


@app.command("rm")
def remove(dataset_id: Id, url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Remove a data set that no waiting or running job needs."""
    with connect(url, key) as service:
        service.call("DELETE", f"/datasets/{dataset_id}")
    if as_json:
        print_json({"id": dataset_id, "removed": True})
    else:
        typer.echo(f"removed {dataset_id}")
