"""TRL's SFTTrainer, set up for rows that are rendered and masked already.

What is ours: which rows go through the model together; the loss, which is the cross entropy summed
over trained tokens and divided by their number in the whole accumulated batch, with the output head
computed for these tokens alone; and the evaluation loss, which is the mean over tokens, not over
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PrinterCallback
from trl import SFTTrainer

from core.data.rendering import TrainingRow
from core.training.checkpoints import ResumableTrainer
from core.training.fused_layers import fuse_layers
from core.training.sampling import similar_batches
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

    def _measure(self, rows: Sequence[dict[str, list[int]]]) -> tuple[float, float]:
        was_training = self.model.training
        self.model.eval()
        total, correct, tokens = 0.0, 0, 0
        with torch.no_grad():
            lengths = [len(row["input_ids"]) for row in rows]
            for places in similar_batches(lengths, self.args.per_device_eval_batch_size):
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

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return sum(batch["trained_tokens"] for batch in batch_samples)

    def _pending(self) -> list[torch.Tensor]:
        return [torch.stack(self._correct).sum()]

    def _settle(self, numbers: list[float]) -> None:
        self.run.tally = self.run.tally.add(judged=self._trained_tokens, right=int(numbers[0]))
        self._trained_tokens = 0
        self._correct.clear()


def as_item(row: TrainingRow) -> dict[str, Any]:
    """Return what the trainer's data set holds of a row."""
    return {"input_ids": row.input_ids, "labels": row.labels}
