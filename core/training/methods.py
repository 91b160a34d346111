"""What is particular to a method: its trainer, and what the report says of its validation rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback
from trl import DPOConfig, SFTConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from core.data.pairs import PreferencePair
from core.data.rendering import TrainingRow
from core.specs import DpoMethod, JobSpec
from core.training import preference, trainer
from core.training.arguments import build_arguments
from core.training.batches import PaddedBatch
from core.training.checkpoints import ResumableTrainer
from core.training.losses import RowLosses, measure_losses
from core.training.memory_ladder import BatchPlan
from core.training.monitor import Monitor
from core.training.preference_report import report_preferences
from core.training.sampling import EpochBatches, order_batches


@dataclass(frozen=True)
class _Method:
    """What a trainer is made of that other methods have otherwise.

    Attributes:
        trainer: TRL's trainer, extended.
        config: Class of its arguments.
        settings: Arguments that only this class has.
        collator: Makes tensors of items; called with the pad token.
        as_item: What the trainer's data set holds of a row.
        options: Further arguments of the trainer.
    """

    trainer: type[ResumableTrainer]
    config: Callable[..., Any]
    settings: dict[str, Any]
    collator: Callable[[int], Any]
    as_item: Callable[[Any], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


def build_trainer(
    model: Any,
    tokenizer: Any,
    spec: JobSpec,
    training: Sequence[TrainingRow | PreferencePair],
    validation: Sequence[TrainingRow | PreferencePair],
    *,
    plan: BatchPlan,
    work_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    monitor: Monitor,
    callbacks: list[Any],
    started: float,
) -> ResumableTrainer:
    """Return the trainer of the spec's method, for a model with an adapter attached.

    Args:
        model: From `attach_lora`.
        tokenizer: Its tokenizer.
        spec: The job.
        training: Rows to learn from, rendered as the method needs them.
        validation: Rows to measure on; may be empty.
        plan: How the rows of a step are divided.
        work_dir: Where the trainer may write.
        device: Where the model is.
        dtype: Precision of the base weights.
        monitor: Hears of checkpoints.
        callbacks: Callbacks of transformers' Trainer.
        started: Time of the monotonic clock from which the work on the job counts.
    """
    method = _method_of(spec)
    patience = spec.training.early_stopping_patience
    if patience is not None and validation:
        callbacks = [*callbacks, EarlyStoppingCallback(patience)]

    def as_items(rows: Sequence[Any]) -> Dataset:
        return Dataset.from_list([method.as_item(row) for row in rows])

    return method.trainer(
        monitor=monitor,
        started=started,
        batches=EpochBatches([row.longest for row in training], order_batches(spec, plan)),
        model=model,
        args=build_arguments(
            method.config,
            spec,
            plan,
            work_dir,
            device,
            dtype,
            rows=len(training),
            parameters=model.num_parameters(),
            validate=bool(validation),
            **method.settings,
        ),
        data_collator=method.collator(tokenizer.pad_token_id),
        train_dataset=as_items(training),
        eval_dataset=as_items(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        **method.options,
    )


def _method_of(spec: JobSpec) -> _Method:
    method = spec.method
    if isinstance(method, DpoMethod):
        settings = {
            "beta": method.beta,
            "loss_type": [method.loss_type],
            "label_smoothing": method.label_smoothing,
            # Of routing nothing is learnt, as in the other methods.
            "router_aux_loss_coef": 0.0,
        }
        return _Method(
            preference.PreferenceTrainer,
            DPOConfig,
            settings,
            DataCollatorForPreference,
            preference.as_item,
            {"dropout": spec.lora.dropout},
        )
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False}
    return _Method(trainer.AdapterTrainer, SFTConfig, settings, PaddedBatch, trainer.as_item)


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
