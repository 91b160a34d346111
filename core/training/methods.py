"""What is particular to a method: its trainer, and what the report says of its validation rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from core.specs import DpoMethod, JobSpec
from core.training import preference, trainer
from core.training.checkpoints import ResumableTrainer
from core.training.losses import RowLosses, measure_losses
from core.training.monitor import Monitor
from core.training.preference_report import report_preferences


def build_trainer(
    model: Any, tokenizer: Any, spec: JobSpec, *rows: Any, **settings: Any
) -> ResumableTrainer:
    """Return the trainer of the spec's method; see `core.training.trainer.build_trainer`.

    Args:
        model: From `attach_lora`.
        tokenizer: Its tokenizer.
        spec: The job.
        rows: Those to learn from and those to measure on, rendered as the method needs them.
        settings: As for every trainer.
    """
    if isinstance(spec.method, DpoMethod):
        return preference.build_trainer(model, tokenizer, spec, *rows, **settings)
    return trainer.build_trainer(model, tokenizer, spec, *rows, **settings)


def loss_measure(
    trained: ResumableTrainer, rows: Sequence[Any], monitor: Monitor, *, batch_rows: int
) -> Callable[[], RowLosses] | None:
    """Return what measures the loss of each validation row, where the method has one per token.

    Args:
        trained: Whose model is measured, as it stands when the result is called.
        rows: Those to measure on; may be empty.
        monitor: Asked whether to stop.
        batch_rows: Rows in a forward pass.
    """
    if not rows or isinstance(trained, preference.PreferenceTrainer):
        return None
    return lambda: measure_losses(
        trained.model, rows, batch_rows=batch_rows, check_stop=monitor.check_stop
    )


def report_validation(
    trained: ResumableTrainer, verdict: dict[str, Any] | None, *, seed: int
) -> dict[str, Any] | None:
    """Return the report's members of a method that has others than losses per token."""
    if isinstance(trained, preference.PreferenceTrainer):
        return report_preferences(trained, verdict, seed=seed)
    return None
