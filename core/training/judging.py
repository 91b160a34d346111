"""Whether an adapter is better than its base, and what it has forgotten.

The figures of the before/after report, and the verdict that promotion goes by. Both are computed on
the same rows by the base model and by the adapter, so every comparison is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.data.rendering import TrainingRow, encode_text
from core.specs import JobSpec
from core.training.losses import RowLosses, measure_losses
from core.training.scores import CONFIDENCE, RESAMPLES, bootstrap_mean, exact_match, rouge_l

_GENERAL_TEXT = Path(__file__).with_name("general_text.txt")
_GENERAL_TOKENS_AT_ONCE = 256
_LARGEST_EXPONENT = 700.0


def compare(base: RowLosses, adapter: RowLosses, *, seed: int) -> dict[str, Any]:
    """Return the losses of base and adapter on the same rows, and the interval of their difference.

    Args:
        base: Of the base model.
        adapter: Of the same rows.
        seed: Of the bootstrap.
    """
    change = bootstrap_mean(adapter.totals - base.totals, base.counts, seed=seed)
    return {
        "rows": len(base.totals),
        "tokens": int(base.counts.sum()),
        "base": _figures(base),
        "adapter": _figures(adapter),
        "loss_change": change.as_dict(),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }


def measure_forgetting(
    model: Any,
    tokenizer: Any,
    *,
    context_length: int | None,
    batch_rows: int,
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Return the loss of base and adapter on a general text that no job trains on.

    A rise says that the adapter writes ordinary language worse than the base did.

    Args:
        model: The base model with its adapter.
        tokenizer: Its tokenizer.
        context_length: Most tokens that the base model can read.
        batch_rows: Pieces of the text in a forward pass.
        check_stop: May raise to end early.
    """
    pieces = _pieces(tokenizer, min(_GENERAL_TOKENS_AT_ONCE, context_length or math.inf))
    with model.disable_adapter():
        base = measure_losses(model, pieces, batch_rows=batch_rows, check_stop=check_stop)
    adapter = measure_losses(model, pieces, batch_rows=batch_rows, check_stop=check_stop)
    return {
        "tokens": int(base.counts.sum()),
        "base": _figures(base),
        "adapter": _figures(adapter),
        "loss_change": adapter.mean - base.mean,
    }


def score_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the mean exact match and ROUGE-L of the answers that have a reference."""
    compared = [sample for sample in samples if sample.get("reference")]
    if not compared:
        return None
    means: dict[str, Any] = {"answers": len(compared)}
    for who in ("base", "adapter"):
        pairs = [(sample[who], sample["reference"]) for sample in compared]
        means[who] = {
            "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
        }
    return means


def judge(
    spec: JobSpec, evaluation: dict[str, Any] | None, forgetting: dict[str, Any]
) -> dict[str, Any]:
    """Return whether the adapter counts as better, and why not.

    It is better when the whole interval of its loss's difference from the base's lies below zero,
    and the loss on general text has risen by no more than the spec allows.

    Returns:
        `better` (`None` without validation rows), `compared_with` and `reasons` against it.
    """
    verdict: dict[str, Any] = {"better": None, "compared_with": "base", "reasons": []}
    reasons: list[str] = verdict["reasons"]
    bound, rise = spec.evaluation.max_forgetting, forgetting["loss_change"]
    # Written so that NaN fails too.
    if bound is not None and not rise <= bound:
        reasons.append(
            f"the loss on general text rose by {rise:.3f}, more than the {bound:g} allowed"
        )
    if evaluation is not None:
        change = evaluation["loss_change"]
        if not change["high"] < 0:
            reasons.append(
                "the loss on validation rows is not clearly below the base's: it changed by"
                f" {change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
            )
        verdict["better"] = not reasons
    return verdict


def _figures(losses: RowLosses) -> dict[str, float | None]:
    mean = losses.mean
    # A sum of too little evidence can be beyond what a float holds as a perplexity.
    perplexity = math.exp(mean) if mean < _LARGEST_EXPONENT else None
    return {"loss": mean, "perplexity": perplexity}


def _pieces(tokenizer: Any, tokens_at_once: float) -> list[TrainingRow]:
    text = _GENERAL_TEXT.read_text(encoding="utf-8")
    ids = encode_text(text, tokenizer).ids
    size = int(tokens_at_once)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    # The first token of a piece is not predicted, so a piece of one token has no loss.
    return [TrainingRow(part, list(part), "", []) for part in parts if len(part) > 1]
