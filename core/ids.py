"""Identifiers: a readable prefix and a ULID, so that ids of one kind sort by creation time."""

from __future__ import annotations

from ulid import ULID


def new_id(prefix: str) -> str:
    """Return a fresh id such as `job-01k9…`; ids of one prefix sort by their time of creation."""
    return f"{prefix}-{str(ULID()).lower()}"
