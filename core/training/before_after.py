"""The before/after report: what a job's adapter does that its base model does not.

Everything in it is computed twice on the same input, with the adapter switched off and on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from core.data.schema import Example
from core.specs import JobSpec
from core.training.evaluation import answer_samples
from core.training.judging import compare, judge, measure_forgetting, score_samples
from core.training.losses import RowLosses
from core.training.monitor import Monitor

_SAMPLES_AT_ONCE = 8


def build_report(
    model: Any,
    tokenizer: Any,
    spec: JobSpec,
    examples: Sequence[Example],
    monitor: Monitor,
    *,
    measure: Callable[[], RowLosses] | None,
    context_length: int | None,
    batch_rows: int,
    memory_rung: int = 0,
) -> dict[str, Any]:
    """Return answers, losses, scores, forgetting and the verdict.

    Args:
        model: The base model with its trained adapter, in evaluation mode.
        tokenizer: Its tokenizer.
        spec: The job.
        examples: Whose prompts are answered.
        monitor: Asked whether to stop.
        measure: Returns the losses of the validation rows by the model as it stands; `None`
            without such rows.
        context_length: Most tokens that the base model can read.
        batch_rows: Rows in a forward pass.
        memory_rung: How far down the memory ladder the attempt is.

    Raises:
        Stopped: The monitor asked for it.
    """
    seed = spec.training.seed
    evaluation = None
    if measure is not None:
        with model.disable_adapter():
            base = measure()
        evaluation = compare(base, measure(), seed=seed)
    forgetting = measure_forgetting(
        model,
        tokenizer,
        context_length=context_length,
        batch_rows=batch_rows,
        check_stop=monitor.check_stop,
    )
    samples = answer_samples(
        model,
        tokenizer,
        examples,
        spec.evaluation,
        monitor,
        seed=seed,
        batch_rows=max(1, _SAMPLES_AT_ONCE >> memory_rung),
    )
    return {
        "samples": samples,
        "sampling": spec.evaluation.model_dump(
            include={"temperature", "top_p", "repetition_penalty", "max_new_tokens"}
        )
        | {"seed": seed},
        "base_eval_loss": evaluation["base"]["loss"] if evaluation else None,
        "eval_loss": evaluation["adapter"]["loss"] if evaluation else None,
        "evaluation": evaluation,
        "scores": score_samples(samples),
        "forgetting": forgetting,
        "verdict": judge(spec, evaluation, forgetting),
    }
