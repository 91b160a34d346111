"""Pins: aliases whose versions engines have in memory at all times."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from core.db.repositories.adapters import AdapterRepository, pinned_versions
from core.errors import NotFound
from core.principal import Principal
from core.reads import AdapterRead
from core.registry.references import is_name
from core.registry.views import get_adapter


@dataclass(frozen=True, order=True)
class PinnedVersion:
    """What engines shall keep."""

    base_digest: str
    digest: str


def set_pin(
    session: Session, principal: Principal, name: str, alias: str, *, pinned: bool
) -> AdapterRead:
    """Pin an alias, or no longer.

    Args:
        session: Opened with `write=True`.
        principal: The owner.
        name: The adapter.
        alias: The alias.
        pinned: Whether engines shall keep what it points at.

    Raises:
        NotFound: Code `unknown_adapter` or `unknown_alias`.
    """
    adapters = AdapterRepository(session, principal.project_id)
    adapter = adapters.get(name, lock=True)
    if not is_name(alias) or not adapters.pin(adapter.id, alias, pinned=pinned):
        raise NotFound(f"{name!r} has no alias {alias[:80]!r}", code="unknown_alias")
    return get_adapter(session, principal, name)


def list_pinned(session: Session) -> list[PinnedVersion]:
    """Return what engines shall keep, for all projects."""
    return [PinnedVersion(*row) for row in pinned_versions(session)]
