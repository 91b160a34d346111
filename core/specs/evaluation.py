"""How an adapter is judged before it is published."""

from __future__ import annotations

from pydantic import Field

from core.specs.strict import StrictSpec


class EvaluationSpec(StrictSpec):
    """The before/after report: the same prompts answered by the base and by the adapter."""

    samples: int = Field(3, ge=0, le=50, description="Prompts answered before and after.")
    max_new_tokens: int = Field(64, ge=1, le=1024)
    temperature: float = Field(0.0, ge=0, le=5, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    max_forgetting: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Most by which the loss per token on general text may rise; over it, the"
        " adapter does not count as better.",
    )
