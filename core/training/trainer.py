"""TRL's SFTTrainer, set up for rows that are rendered and masked already.

What is ours: batches are padded by length; the loss is the cross entropy summed over trained tokens
and divided by their number in the whole accumulated batch, with the output head computed only where
some row of the batch is trained; the evaluation loss is the mean over tokens, not over batches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import EarlyStoppingCallback, PrinterCallback
from trl import SFTConfig

from core.data.rendering import IGNORED_LABEL, TrainingRow
from core.data.split import count_steps
from core.errors import TrainingFailed
from core.specs import JobSpec, TrainingSpec
from core.training.checkpoints import ResumableTrainer
from core.training.memory_ladder import BatchPlan
from core.training.monitor import Monitor

# Recomputing activations costs a third of the speed; small models and CPUs have memory enough.
_CHECKPOINTING_FROM_PARAMETERS = 1_000_000_000


class PaddedBatch:
    """Collates rows of ids and labels, padded on the right.

    Args:
        pad_token_id: Fills `input_ids`; whether a position is padding is told by the mask alone,
            since the pad token may be one that is learnt.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each of shape (rows, longest row)."""
        longest = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), longest), self._pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED_LABEL)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            attention_mask[index, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class AdapterTrainer(ResumableTrainer):
    """SFTTrainer with our checkpoints and our loss; see the module's docstring."""

    # The loss divides by the tokens of the accumulated batch already.
    loss_is_scaled_for_ga = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)
        # Has Trainer count the trained tokens of each accumulated batch for us.
        self.model_accepts_loss_kwargs = True
        forward = inspect.signature(type(self.model.get_base_model()).forward)
        self._selects_positions = "logits_to_keep" in forward.parameters

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the batch's share of the mean loss per trained token.

        Raises:
            TrainingFailed: Code `loss_not_finite`.
        """
        if return_outputs:
            raise NotImplementedError("nothing here needs the outputs")
        total, count = self._sum_loss(model, inputs)
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise TrainingFailed(
                f"the loss is no longer a finite number at step {self.state.global_step + 1}",
                code="loss_not_finite",
                hint="Lower training.learning_rate, or lengthen training.warmup_ratio.",
            )
        self.run.seen_tokens += int(inputs["attention_mask"].sum())
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log the mean loss per trained token of the validation rows."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {f"{metric_key_prefix}_loss": self.mean_loss(rows)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def mean_loss(self, rows: Sequence[dict[str, list[int]]]) -> float:
        """Return the loss over all trained tokens of `rows`; stops early on request."""
        was_training = self.model.training
        self.model.eval()
        sums, tokens = 0.0, 0
        size = self.args.per_device_eval_batch_size
        with torch.no_grad():
            for start in range(0, len(rows), size):
                batch = self._prepare_inputs(
                    self.data_collator(
                        [rows[i] for i in range(start, min(start + size, len(rows)))]
                    )
                )
                total, count = self._sum_loss(self.model, batch)
                sums += total.item()
                tokens += count
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        self.model.train(was_training)
        return sums / tokens

    def _sum_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the summed cross entropy of a batch and the number of tokens in the sum."""
        targets = inputs["labels"][:, 1:]
        trained = targets != IGNORED_LABEL
        arguments = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "use_cache": False,
        }
        if self._selects_positions:
            # Positions in which at least one row of the batch is trained.
            positions = trained.any(dim=0).nonzero().squeeze(1)
            logits = model(**arguments, logits_to_keep=positions).logits
            targets = targets[:, positions]
        else:
            logits = model(**arguments).logits[:, :-1]
        total = functional.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        return total, int(trained.sum())


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
        args=_arguments(
            spec,
            plan,
            work_dir,
            device,
            dtype,
            rows=len(training),
            parameters=model.num_parameters(),
            validate=bool(validation),
        ),
        data_collator=PaddedBatch(tokenizer.pad_token_id),
        train_dataset=_as_items(training),
        eval_dataset=_as_items(validation) if validation else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def _as_items(rows: Sequence[TrainingRow]) -> Dataset:
    return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def _arguments(
    spec: JobSpec,
    plan: BatchPlan,
    work_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int,
    parameters: int,
    validate: bool,
) -> SFTConfig:
    training: TrainingSpec = spec.training
    on_cpu = device.type == "cpu"
    return SFTConfig(
        output_dir=str(work_dir / "trainer"),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        # Rounded down, unlike Trainer's ratio: the first warm-up step has a rate of zero, so a job
        # of a single step would learn nothing.
        warmup_steps=math.floor(count_steps(rows, training) * training.warmup_ratio),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        train_sampling_strategy="random" if spec.data.shuffle else "sequential",
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy=_evaluation_strategy(training) if validate else "no",
        eval_steps=training.eval_steps,
        metric_for_best_model="eval_loss",
        # Ours to decide, see `SavingCallback`.
        save_strategy="no",
        # The patience that early stopping has left.
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=dtype == torch.bfloat16 and device.type == "cuda",
        fp16=False,
        activation_checkpointing=plan.activation_checkpointing
        or (not on_cpu and parameters >= _CHECKPOINTING_FROM_PARAMETERS),
        dataloader_pin_memory=device.type == "cuda",
        dataset_kwargs={"skip_prepare_dataset": True},
        # Rows are checked against the limit before; nothing may cut or drop them here.
        max_length=None,
        packing=False,
        remove_unused_columns=False,
    )


def _evaluation_strategy(training: TrainingSpec) -> str:
    return "epoch" if training.eval_steps is None else "steps"
