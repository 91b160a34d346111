"""The memory ladder: a job that ran out of memory is tried again with less of it at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from core.specs import LAST_RUNG, TrainingSpec


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of an optimizer step are divided.

    Attributes:
        batch_size: Rows per forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
        activation_checkpointing: Whether activations are recomputed instead of kept.
    """

    batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for an event."""
        return asdict(self)


def next_rung(training: TrainingSpec, rung: int) -> int | None:
    """Return the first rung further down that needs less memory; `None` at the ladder's end."""
    plan = plan_batches(training, rung)
    lower = range(rung + 1, LAST_RUNG + 1)
    return next((other for other in lower if plan_batches(training, other) != plan), None)


def plan_batches(training: TrainingSpec, rung: int) -> BatchPlan:
    """Return how a rung of the ladder divides the rows of each optimizer step.

    Each rung halves the rows of a forward pass. The rows of a step are the spec's at every rung, in
    the same order: the step is cut into equal parts, so where the half divides no step evenly, the
    next smaller number that does is taken.
    """
    rows = training.batch_size * training.gradient_accumulation_steps
    most = max(1, training.batch_size >> rung)
    batch_size = next(size for size in range(most, 0, -1) if rows % size == 0)
    checkpoints = training.gradient_checkpointing is True or rung >= LAST_RUNG
    return BatchPlan(batch_size, rows // batch_size, checkpoints)
