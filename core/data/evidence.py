"""What a promotion that depends on the outcome needs of the validation rows."""

from __future__ import annotations

from typing import Final

from core.errors import InvalidInput
from core.specs import JobSpec

LEAST_ROWS: Final = 8
"""With fewer validation rows a bootstrap interval says nothing."""


def check_evidence(spec: JobSpec, validation_rows: int) -> None:
    """Refuse a job whose promotion would have nothing to go by.

    Raises:
        InvalidInput: Code `promotion_needs_evidence`.
    """
    if spec.promote == "if_better" and validation_rows < LEAST_ROWS:
        raise InvalidInput(
            f"promote: if_better needs at least {LEAST_ROWS} validation rows, not"
            f" {validation_rows}",
            code="promotion_needs_evidence",
            field="promote",
            hint="Give more validation rows, or promote by hand (promote: manual).",
        )
