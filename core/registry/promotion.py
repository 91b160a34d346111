"""When a job's version becomes the latest, and when no alias may point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_MAX_REASON = 255


@dataclass(frozen=True)
class Promotion:
    """What becomes of a new version.

    Attributes:
        promoted: `latest` moves to it.
        quarantine: Why no alias may point at it; `None` where one may.
    """

    promoted: bool = True
    quarantine: str | None = None


def decide(
    policy: Literal["always", "if_better", "manual"], report: Mapping[str, Any]
) -> Promotion:
    """Return what a job's policy makes of its before/after report.

    Args:
        policy: Of the spec.
        report: With a `verdict`, which only `if_better` goes by.
    """
    match policy:
        case "always":
            return Promotion()
        case "manual":
            return Promotion(promoted=False)
        case "if_better":
            verdict = report.get("verdict") or {}
            if verdict.get("better") is True:
                return Promotion()
            reasons = "; ".join(verdict.get("reasons") or ["there is no evidence for it"])
            return Promotion(promoted=False, quarantine=reasons[:_MAX_REASON])
