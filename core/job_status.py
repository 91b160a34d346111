"""The states of a job and the moves between them.

    validating → queued → running → succeeded | failed | cancelled

A job that waits or runs can be paused; a paused one goes back to where it waited. One that failed
or was cancelled can be tried again. A dry run has succeeded once it is validated. Every statement
that moves a job asks this table, so a move that is not in it cannot happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

JobStatus = Literal["validating", "queued", "running", "paused", "succeeded", "failed", "cancelled"]

MOVES: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    # To itself: its worker went away, and it waits for another.
    "validating": frozenset({"validating", "queued", "paused", "succeeded", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"validating", "queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset({"validating", "queued"}),
    "cancelled": frozenset({"validating", "queued"}),
}
TERMINAL: Final = ("succeeded", "failed", "cancelled")
UNFINISHED: Final = ("validating", "queued", "running", "paused")
WAITING: Final = ("validating", "queued")


def sources(target: JobStatus) -> tuple[JobStatus, ...]:
    """Return the states from which a job can come to `target`."""
    return tuple(status for status, targets in MOVES.items() if target in targets)
