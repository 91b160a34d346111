"""Secrets in files: a variable `NAME_FILE` names a file whose content is the value of `NAME`.

Owns the rules for that, which are those of the official database images: one way or the other, not
both. Knows not which settings are secrets.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import AliasChoices
from pydantic_settings import BaseSettings, EnvSettingsSource

from core.errors import InvalidInput

_SUFFIX = "_FILE"
# Of a URL or a password; a larger file is some other file.
_MAX_BYTES = 64 * 1024


class EnvironmentWithFiles(EnvSettingsSource):
    """The environment, in which some settings may be given by files.

    Args:
        settings_cls: The settings.
        secrets: The fields that may be given so.

    Raises:
        InvalidInput: Code `setting_given_twice`, `secret_file_unreadable` or `secret_file_empty`.
    """

    def __init__(self, settings_cls: type[BaseSettings], secrets: Collection[str]) -> None:
        super().__init__(settings_cls)
        found: dict[str, str | None] = {}
        for field in sorted(secrets):
            names = variables_of(settings_cls, field)
            value = _value(names)
            if value is not None:
                # Under all of its names, of which an empty one may be set.
                found |= {name.lower(): value for name in names}
        self.env_vars = {**self.env_vars, **found}


def variables_of(settings_cls: type[BaseSettings], field: str) -> list[str]:
    """Return the variables that may give a field its value, the strongest first."""
    alias = settings_cls.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [f"{settings_cls.model_config['env_prefix']}{field}".upper()]


def file_variables_of(settings_cls: type[BaseSettings], field: str) -> list[str]:
    """Return the variables that may name a file with a field's value."""
    return [name + _SUFFIX for name in variables_of(settings_cls, field)]


def _value(names: Sequence[str]) -> str | None:
    given = [name for name in names if os.environ.get(name)]
    given_by_file = [name + _SUFFIX for name in names if os.environ.get(name + _SUFFIX)]
    if not given_by_file:
        return None
    if len(given + given_by_file) > 1:
        raise InvalidInput(
            f"{' and '.join(given + given_by_file)} are both set",
            code="setting_given_twice",
            field=given_by_file[0],
            hint="Set one of them.",
        )
    return _read(given_by_file[0])


def _read(variable: str) -> str:
    path = Path(os.environ[variable])
    try:
        with path.open("rb") as file:
            value = file.read(_MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else "it is no text"
        raise InvalidInput(
            f"{variable} names {path}, which cannot be read: {reason}",
            code="secret_file_unreadable",
            field=variable,
            hint="The file must exist and be readable for the user that runs this process.",
        ) from error
    # Editors and `echo` end a file with a newline that is no part of a secret.
    value = value.rstrip("\r\n")
    if not value or len(value) > _MAX_BYTES:
        raise InvalidInput(
            f"{variable} names {path}, which is {'too large' if value else 'empty'}",
            code="secret_file_empty" if not value else "secret_file_unreadable",
            field=variable,
            hint="Write the secret into it, and nothing else.",
        )
    return value
