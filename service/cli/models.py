"""`tunesmith models`: the base models that the service may train and serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.local import open_database
from service.cli.output import (
    Json,
    note,
    print_json,
    print_members,
    print_table,
    show_bytes,
    show_time,
)
from service.cli.settings import DataDir, load_settings

app = typer.Typer(help="Add, list and remove base models.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="What clients call the model.")]


@app.command("add")
def add(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model directory, hf:ID@REVISION, gguf:FILE, or `sample` for the sample model.",
        ),
    ],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Add a base model; adding the same again changes nothing.

    A directory is used where it is. A model from the hub is downloaded and a GGUF file is
    converted, both below the data directory.
    """
    from core import base_models

    if source == "sample":
        from service.sample_model import sample_gguf_path

        source = f"gguf:{sample_gguf_path()}"
    settings = load_settings(data_dir)
    with open_database(settings) as database:
        if not as_json:
            note(f"adding {name}; this takes from seconds to minutes …")
        model = base_models.add(database, settings, name, source).model_dump(mode="json")
    print_json(model) if as_json else typer.echo(_describe(model))


@app.command("list")
def list_models(data_dir: DataDir = None, as_json: Json = False) -> None:
    """List the base models."""
    from core import base_models

    with open_database(load_settings(data_dir)) as database, database.session() as session:
        models = [model.model_dump(mode="json") for model in base_models.list_models(session)]
    if as_json:
        print_json(models)
        return
    print_table(
        ("name", "architecture", "parameters", "size", "digest", "source"),
        [
            (
                model["name"],
                model["architecture"],
                f"{model['parameters'] / 1e6:.0f} M",
                show_bytes(model["bytes"]),
                model["digest"][:12],
                model["source"],
            )
            for model in models
        ],
        empty="No base models. `tunesmith models add NAME SOURCE` adds one.",
    )


@app.command("show")
def show(name: Name, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Show one base model and where its files are."""
    from core import base_models

    with open_database(load_settings(data_dir)) as database, database.session() as session:
        model = base_models.get(session, name).model_dump(mode="json")
        model["path"] = base_models.get_ref(session, name).path
    if as_json:
        print_json(model)
    else:
        print_members(
            {
                **model,
                "bytes": show_bytes(model["bytes"]),
                "created_at": show_time(model["created_at"]),
            }
        )


@app.command("move")
def move(
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where they are now.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Say where the files of a base model are now, as after a restore on another machine."""
    from core import base_models

    with open_database(load_settings(data_dir)) as database:
        model = base_models.move(database, name, directory).model_dump(mode="json")
    print_json(model) if as_json else typer.echo(_describe(model))


@app.command("rm")
def remove(name: Name, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Remove a base model that no adapter and no unfinished job needs."""
    from core import base_models

    settings = load_settings(data_dir)
    with open_database(settings) as database:
        base_models.remove(database, settings, name)
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        typer.echo(f"removed {name}")


def _describe(model: dict[str, Any]) -> str:
    return (
        f"{model['name']}  {model['architecture']}, {model['parameters'] / 1e6:.0f} M parameters, "
        f"digest {model['digest'][:12]}"
    )
