"""The settings of commands that work on this machine's data, not over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from core.errors import InvalidInput

if TYPE_CHECKING:
    from core.config import Settings

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="The service's data; ./data by default.", envvar="TUNESMITH_DATA_DIR"
    ),
]


def load_settings(data_dir: Path | None) -> Settings:
    """Return the settings of the environment, with `data_dir` in place, and send logs to stderr.

    Raises:
        InvalidInput: Code `invalid_settings`; a variable has a bad value.
    """
    from pydantic import ValidationError

    from core.config import Settings
    from core.logging import configure

    try:
        settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    except ValidationError as error:
        findings = [
            {"field": ".".join(map(str, entry["loc"])), "message": entry["msg"]}
            for entry in error.errors()
        ]
        raise InvalidInput(
            "a setting has a value that is not allowed",
            code="invalid_settings",
            hint="Settings come from TUNESMITH_… variables.",
            errors=findings,
        ) from error
    # Otherwise the first log line would land in the output.
    configure(settings, "cli")
    return settings
