"""What the before/after report says of a job that learnt from preference pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from core.training.preference import JudgedPairs, PreferenceTrainer
from core.training.scores import CONFIDENCE, RESAMPLES, bootstrap_mean


def report_preferences(
    trainer: PreferenceTrainer, verdict: dict[str, Any] | None, *, seed: int
) -> dict[str, Any]:
    """Return the report's members about the validation pairs.

    Args:
        trainer: Its model has the adapter's final weights.
        verdict: What else there is to say for and against the adapter.
        seed: Of the bootstrap.

    Returns:
        `preferences`, `eval_loss`, `base_eval_loss` (that of the reference) and `verdict`.
    """
    judged = trainer.judge_validation()
    preferences = describe_preferences(judged, seed=seed)
    return {
        "preferences": preferences,
        "eval_loss": judged.loss,
        "base_eval_loss": trainer.reference_loss(),
        "verdict": judge_preferences(verdict, preferences),
    }


def describe_preferences(judged: JudgedPairs, *, seed: int) -> dict[str, Any]:
    """Return accuracy and mean margin with their bootstrap intervals."""
    pairs = np.ones(len(judged.margins))
    right = (judged.margins > 0).astype(np.float64)
    return {
        "pairs": len(judged.margins),
        "accuracy": bootstrap_mean(right, pairs, seed=seed).as_dict(),
        "margin": bootstrap_mean(judged.margins, pairs, seed=seed).as_dict(),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }


def judge_preferences(
    verdict: dict[str, Any] | None, preferences: dict[str, Any]
) -> dict[str, Any]:
    """Return the verdict with what the pairs say added.

    The adapter is better when the whole interval of its mean margin lies above zero.
    """
    reasons = list(verdict["reasons"]) if verdict else []
    margin = preferences["margin"]
    # Written so that NaN fails too.
    if not margin["low"] > 0:
        reasons.append(
            "the adapter does not clearly prefer the chosen answers of the validation pairs: the"
            f" mean margin is {margin['mean']:+.3f} ({margin['low']:+.3f} to {margin['high']:+.3f})"
        )
    return {"better": not reasons, "compared_with": "reference", "reasons": reasons}
