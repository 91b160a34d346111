"""What a worker reports about a running job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_EVENT_TYPE = 32


@dataclass(frozen=True)
class EventUpdate:
    """An entry for the job's history."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.type) <= MAX_EVENT_TYPE:
            raise ValueError(f"an event's type has 1 to {MAX_EVENT_TYPE} characters")


@dataclass(frozen=True)
class MetricUpdate:
    """Measurements at one step; those left out keep what the step already has."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    accuracy: float | None = None
    eval_accuracy: float | None = None
    margin: float | None = None
    eval_margin: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class ProgressUpdate:
    """How far the job is; members left out keep their value."""

    stage: str | None = None
    step: int | None = None
    total_steps: int | None = None
    eta_seconds: float | None = None
    trained_tokens: int | None = None


Update = EventUpdate | MetricUpdate | ProgressUpdate
