"""What a worker has, so that it takes only jobs that it can run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """What a worker offers to jobs; by default it can run any.

    Attributes:
        device: `cpu`, `cuda` or `mps`; `None` is not known, and every job is taken.
        memory_bytes: Of that device; 0 is not known, and every job is taken.
        absent_base_models: Names of registered base models whose files this machine lacks.
        warm_base: Name of the base model that its child has in memory.
    """

    device: str | None = None
    memory_bytes: int = 0
    absent_base_models: frozenset[str] = frozenset()
    warm_base: str | None = None


ANY = Capabilities()
