"""What housekeeping removed, by kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Kind = Literal[
    "checkpoints",
    "jobs",
    "exports",
    "deliveries",
    "idempotency_keys",
    "blobs",
    "adapters",
    "temporary",
]
KINDS: Final[tuple[Kind, ...]] = (
    "checkpoints",
    "jobs",
    "exports",
    "deliveries",
    "idempotency_keys",
    "blobs",
    "adapters",
    "temporary",
)


@dataclass
class Removed:
    """How many objects of a kind, and what they took up in the artifact store."""

    count: int = 0
    bytes: int = 0

    def add(self, count: int = 1, size: int = 0) -> None:
        """Count further objects."""
        self.count += count
        self.bytes += size


@dataclass
class Report:
    """What was removed, or would be.

    Attributes:
        removed: By kind.
        refused: Why stored objects without a reference were left alone, if they were.
    """

    removed: dict[Kind, Removed] = field(
        default_factory=lambda: {kind: Removed() for kind in KINDS}
    )
    refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)
