"""What an adapter reference means: `NAME`, `NAME@3` or `NAME:alias`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from core.db.repositories.adapters import AdapterRepository
from core.errors import InvalidInput, NotFound
from core.principal import Principal

LATEST: Final = "latest"
NAME_HINT: Final = "Use lower-case letters, digits, '.', '_' and '-'; at most 63 characters."

_NAME = r"[a-z0-9][a-z0-9._-]{0,62}"
# Nine digits fit the column; no adapter has a billion versions.
_REFERENCE = re.compile(rf"(?P<name>{_NAME})(@(?P<version>[0-9]{{1,9}})|:(?P<alias>{_NAME}))?")


@dataclass(frozen=True)
class ResolvedAdapter:
    """What a reference means at this moment; the digest is what caches are keyed by."""

    name: str
    version: int
    digest: str
    base_model: str
    base_digest: str
    version_id: str


def resolve(session: Session, principal: Principal, reference: str) -> ResolvedAdapter:
    """Return the version that `NAME`, `NAME@3` or `NAME:alias` means, in one indexed query.

    Raises:
        InvalidInput: Code `invalid_adapter_reference`.
        NotFound: Code `unknown_adapter`, or `no_latest_version` for a bare name of an adapter whose
            versions were all published without promotion.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise InvalidInput(
            f"{reference[:80]!r} is not an adapter reference",
            code="invalid_adapter_reference",
            field="adapter",
            hint="Write NAME, NAME@VERSION or NAME:ALIAS.",
        )
    name, number = match["name"], match["version"]
    adapters = AdapterRepository(session, principal.project_id)
    version = (
        adapters.find_version(name, int(number))
        if number is not None
        else adapters.find_aliased(name, match["alias"] or LATEST)
    )
    if version is None and reference == name and (newest := adapters.newest_of(name)):
        raise NotFound(
            f"no version of {name!r} has been promoted to {LATEST!r}",
            code="no_latest_version",
            field="adapter",
            hint=f"Name a version, such as {name}@{newest}, or move the alias {LATEST!r} to one.",
        )
    if version is None:
        raise NotFound(
            f"no adapter {reference!r}",
            code="unknown_adapter",
            field="adapter",
            hint="GET /adapters lists names, versions and aliases.",
        )
    return ResolvedAdapter(
        name=name,
        version=version.version,
        digest=version.digest,
        base_model=version.base_model,
        base_digest=version.base_digest,
        version_id=version.id,
    )


def is_name(text: str) -> bool:
    """Tell whether a text can name an adapter or an alias."""
    return re.fullmatch(_NAME, text) is not None
