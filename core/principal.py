"""Who acts: the project a request belongs to and what its key allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from core.errors import Forbidden

SCOPES: Final = ("admin", "train", "generate", "read")
DEFAULT_PROJECT_ID: Final = "project-default"
DEFAULT_PROJECT_NAME: Final = "default"


@dataclass(frozen=True)
class Principal:
    """An authenticated caller.

    Attributes:
        project_id: Owner of everything the caller may see.
        scopes: Granted scopes, implied ones included.
        key_id: The API key used; `None` for the local user.
    """

    project_id: str
    scopes: frozenset[str]
    key_id: str | None = None

    def require(self, scope: str) -> None:
        """Refuse a caller without `scope`.

        Raises:
            Forbidden: Code `missing_scope`.
        """
        if scope not in self.scopes:
            raise Forbidden(
                f"this API key lacks the scope {scope!r}",
                code="missing_scope",
                hint="Ask the operator for a key with that scope.",
            )


def expand_scopes(scopes: frozenset[str]) -> frozenset[str]:
    """Return `scopes` with the implied ones: admin implies all, train and generate imply read."""
    if "admin" in scopes:
        return frozenset(SCOPES)
    return scopes | {"read"} if scopes & {"train", "generate"} else scopes


LOCAL: Final = Principal(DEFAULT_PROJECT_ID, frozenset(SCOPES))
"""The user of a service that runs without keys on this machine."""
