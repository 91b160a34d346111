"""JSON that commands read from a file, or from stdin where the path is `-`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from core.errors import InvalidInput


def read_json(path: Path) -> Any:
    """Return the JSON value in a file, or on stdin for `-`.

    Raises:
        InvalidInput: Code `invalid_json`.
        typer.BadParameter: There is no such file, or it cannot be read.
    """
    try:
        if str(path) == "-":
            return json.load(typer.get_binary_stream("stdin"))
        return json.loads(path.read_bytes())
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    except ValueError as error:
        name = "stdin" if str(path) == "-" else path
        raise InvalidInput(f"{name} is not JSON: {error}", code="invalid_json") from error
