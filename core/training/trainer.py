"""TRL's SFTTrainer, set up for rows that are rendered and masked already.

What is ours: which rows go through the model together; the loss, which is the cross entropy summed
over trained tokens and divided by their number in the whole accumulated batch, with the output head
computed for these tokens alone; and the evaluation loss, which is the mean over tokens, not over
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback
from trl import SFTConfig, SFTTrainer

from core.data.rendering import TrainingRow
from core.specs import JobSpec
from core.training.arguments import build_arguments
from core.training.batches import PaddedBatch
from core.training.checkpoints import ResumableTrainer
from core.training.fused_layers import fuse_layers
from core.training.memory_ladder import BatchPlan
from core.training.monitor import Monitor
from core.training.sampling import EpochBatches, order_batches
from core.training.token_loss import TokenLossFunction


class AdapterTrainer(ResumableTrainer, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with our checkpoints and our loss; see the module's docstring."""

    # The loss divides by the tokens of the accumulated batch already.
    loss_is_scaled_for_ga = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)
        if self.args.device.type == "cpu":
            fuse_layers(self.model)
        self._sum_loss = TokenLossFunction(self.model)
        # Of the batches of this step, which are not waited for.
        self._trained_tokens = 0
        self._correct: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the batch's share of the mean loss per trained token."""
        if return_outputs:
            raise NotImplementedError("nothing here needs the outputs")
        sums = self._sum_loss(model, inputs)
        self.run.seen_tokens += inputs["row_tokens"]
        self._trained_tokens += inputs["trained_tokens"]
        self._correct.append(sums.correct)
        return sums.total / (num_items_in_batch or inputs["trained_tokens"])

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log mean loss and accuracy of the validation rows' trained tokens."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        loss, accuracy = self._measure(rows)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_accuracy": accuracy}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def mean_loss(self, rows: Sequence[dict[str, list[int]]]) -> float:
        """Return the loss over all trained tokens of `rows`; stops early on request."""
        return self._measure(rows)[0]

    def _measure(self, rows: Sequence[dict[str, list[int]]]) -> tuple[float, float]:
        was_training = self.model.training
        self.model.eval()
        total, correct, tokens = 0.0, 0, 0
        with torch.no_grad():
            for places in self._evaluation_batches(rows):
                batch = self._prepare_inputs(self.data_collator([rows[i] for i in places]))
                sums = self._sum_loss(self.model, batch)
                total += sums.total.item()
                correct += int(sums.correct)
                tokens += batch["trained_tokens"]
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        self.model.train(was_training)
        return total / tokens, correct / tokens

    def _evaluation_batches(self, rows: Sequence[dict[str, list[int]]]) -> list[list[int]]:
        lengths = [len(row["input_ids"]) for row in rows]
        places = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = self.args.per_device_eval_batch_size
        return [places[start : start + size] for start in range(0, len(places), size)]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return sum(batch["trained_tokens"] for batch in batch_samples)

    def _pending(self) -> list[torch.Tensor]:
        return [torch.stack(self._correct).sum()]

    def _settle(self, numbers: list[float]) -> None:
        self.run.tally = self.run.tally.add(judged=self._trained_tokens, right=int(numbers[0]))
        self._trained_tokens = 0
        self._correct.clear()


def build_trainer(
    model: Any,
    tokenizer: Any,
    spec: JobSpec,
    training: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    *,
    plan: BatchPlan,
    work_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    monitor: Monitor,
    callbacks: list[Any],
    started: float,
) -> AdapterTrainer:
    """Return a trainer for a model with an adapter attached.

    Args:
        model: From `attach_lora`.
        tokenizer: Its tokenizer.
        spec: The job.
        training: Rows to learn from.
        validation: Rows to measure on; may be empty.
        plan: How the rows of a step are divided.
        work_dir: Where the trainer may write.
        device: Where the model is.
        dtype: Precision of the base weights.
        monitor: Hears of checkpoints.
        callbacks: Callbacks of transformers' Trainer.
        started: Time of the monotonic clock from which the work on the job counts.
    """
    patience = spec.training.early_stopping_patience
    if patience is not None and validation:
        callbacks = [*callbacks, EarlyStoppingCallback(patience)]
    return AdapterTrainer(
        monitor=monitor,
        started=started,
        model=model,
        args=build_arguments(
            SFTConfig,
            spec,
            plan,
            work_dir,
            device,
            dtype,
            rows=len(training),
            parameters=model.num_parameters(),
            validate=bool(validation),
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=False,
        ),
        batches=EpochBatches([len(row.input_ids) for row in training], order_batches(spec, plan)),
        data_collator=PaddedBatch(tokenizer.pad_token_id),
        train_dataset=_as_items(training),
        eval_dataset=_as_items(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _as_items(rows: Sequence[TrainingRow]) -> Dataset:
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
