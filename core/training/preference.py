"""TRL's DPOTrainer, set up for preference pairs that are rendered already.

The loss is TRL's. What is ours: the reference is measured once, before the first step, by the model
as training finds it, which is the base model or the adapter that the job continues; every pair
counts alike in its step, however the step is cut into forward passes; log probabilities are
computed only where some answer of the batch is; and an evaluation is the mean over pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PrinterCallback
from trl import DPOTrainer

from core.data.pairs import PreferencePair
from core.data.rendering import IGNORED_LABEL
from core.training.checkpoints import ResumableTrainer, Tally
from core.training.fused_layers import fuse_layers
from core.training.sampling import similar_batches
from core.training.token_loss import ignores_padding

# Where TRL looks for a reference that is known already: of the chosen and the rejected answers.
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class JudgedPairs:
    """How a model stands to pairs, compared with the reference.

    Attributes:
        loss: Mean over the pairs.
        margins: By how much it prefers each pair's chosen answer more than the reference does, in
            units of reward (log probability times beta).
    """

    loss: float
    margins: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Share of the pairs whose chosen answer it prefers more than the reference does."""
        return float((self.margins > 0).mean())


@dataclass(frozen=True)
class _Answered:
    """What TRL reads of a forward pass; all but the first are for figures that we do not use."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


class PreferenceTrainer(ResumableTrainer, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer with our checkpoints, reference and evaluation; see the module's docstring.

    Args:
        dropout: Of the adapter; only passes that learn have it.
        arguments: Those of DPOTrainer.
    """

    # The loss is the batch's share of its step already.
    loss_is_scaled_for_ga = True

    def __init__(self, *, dropout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.train_dataset: Dataset
        self.eval_dataset: Dataset | None
        self.remove_callback(PrinterCallback)
        # TRL's frozen copy of the adapter. Its answers are measured before the first step instead,
        # when the adapter itself still gives them.
        self.model.delete_adapter("ref")
        self.precompute_ref_logps = True
        _restore_dropout(self.model, dropout)
        if self.args.device.type == "cpu":
            fuse_layers(self.model)
        base = self.model.get_base_model()
        self._needs_mask = not ignores_padding(base)
        # TRL's output head is made for CUDA; elsewhere it computes the prompts' positions too.
        self._selects_positions = (
            "logits_to_keep" in inspect.signature(type(base).forward).parameters
            and self.args.device.type != "cuda"
        )

    def train_from(self, resume_dir: Path | None) -> None:
        """Measure the reference, then do as `ResumableTrainer.train_from`."""
        self.train_dataset = self._add_reference(self.train_dataset, self._reached())
        if self.eval_dataset is not None:
            self.eval_dataset = self._add_reference(self.eval_dataset)
        super().train_from(resume_dir)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the batch's share of the mean loss per pair of its step."""
        if return_outputs:
            raise NotImplementedError("nothing here needs the outputs")
        answered = self._answer(model, inputs)
        loss = self._mean_loss(answered, inputs)
        margins = self._margins(answered, inputs)
        self.run.seen_tokens += int(inputs["attention_mask"].sum())
        self.run.tally = self.run.tally.add(
            judged=len(margins), right=int((margins > 0).sum()), margin=float(margins.sum())
        )
        return loss * (len(margins) / (num_items_in_batch or len(margins)))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log loss, accuracy and mean margin of the validation pairs."""
        judged = self.judge_validation()
        metrics = {
            f"{metric_key_prefix}_loss": judged.loss,
            f"{metric_key_prefix}_accuracy": judged.accuracy,
            f"{metric_key_prefix}_margin": float(judged.margins.mean()),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def judge_validation(self) -> JudgedPairs:
        """Compare the model with the reference on the validation pairs; stops early on request."""
        assert self.eval_dataset is not None
        total, margins = 0.0, np.zeros(len(self.eval_dataset))
        for places, inputs, answered in self._answer_all(self.eval_dataset):
            total += self._mean_loss(answered, inputs).item() * len(places)
            margins[places] = self._margins(answered, inputs).cpu().numpy()
        return JudgedPairs(total / len(margins), margins)

    def reference_loss(self) -> float:
        """Return the mean loss that the reference itself has on the validation pairs."""
        assert self.eval_dataset is not None
        chosen, rejected = (torch.tensor(self.eval_dataset[name]) for name in _REFERENCE)
        both = torch.cat([chosen, rejected])
        nothing = torch.zeros(len(both), 1)
        inputs = {
            "input_ids": torch.zeros(len(both), 2, dtype=torch.long),
            "attention_mask": torch.ones(len(both), 2, dtype=torch.long),
            "completion_mask": torch.ones(len(both), 2, dtype=torch.long),
            **dict(zip(_REFERENCE, (chosen, rejected), strict=True)),
        }
        answered = _Answered(both.unsqueeze(1), nothing, nothing, nothing.bool())
        return self._mean_loss(answered, inputs).item()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what the pairs since the last time were judged as."""
        if "loss" in logs:
            logs |= self.run.tally.means()
            self.run.tally = Tally()
        super().log(logs, start_time)

    def _mean_loss(self, answered: _Answered, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return TRL's loss for log probabilities that are known."""
        loss = super().compute_loss(lambda **_: answered, inputs)
        # TRL's own figures are means over batches, and lost when a job is interrupted.
        for figures in self._metrics.values():
            figures.clear()
        assert isinstance(loss, torch.Tensor)
        return loss

    def _margins(self, answered: _Answered, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        chosen, rejected = answered.log_probs.detach().sum(dim=1).chunk(2)
        more, less = (inputs[name] for name in _REFERENCE)
        margins: torch.Tensor = self.beta * ((chosen - more) - (rejected - less))
        return margins

    def _answer(self, model: Any, inputs: dict[str, torch.Tensor]) -> _Answered:
        """Return the log probability of each token of the answers, and zeros elsewhere."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED_LABEL)
        arguments: dict[str, Any] = {"input_ids": inputs["input_ids"], "use_cache": False}
        if self._needs_mask:
            arguments["attention_mask"] = inputs["attention_mask"]
        else:
            count = labels.shape[1]
            arguments["position_ids"] = torch.arange(count, device=labels.device).unsqueeze(0)
        if not self._selects_positions:
            log_probs = model(**arguments, labels=labels, fused_lm_head=True).log_probs
        else:
            targets = labels[:, 1:]
            answers = targets != IGNORED_LABEL
            positions = answers.any(dim=0).nonzero().squeeze(1)
            logits = model(**arguments, logits_to_keep=positions).logits
            logits = logits[answers[:, positions]].float()
            chosen = logits.gather(1, targets[answers].unsqueeze(1)).squeeze(1)
            log_probs = logits.new_zeros(targets.shape)
            log_probs[answers] = chosen - logits.logsumexp(dim=1)
        nothing = torch.zeros_like(log_probs, requires_grad=False)
        return _Answered(log_probs, nothing, nothing, nothing.bool())

    def _answer_all(
        self, items: Dataset, places: Iterable[int] | None = None
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor], _Answered]]:
        """Yield places, batch and answers of the items, without dropout and gradients."""
        was_training = self.model.training
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        for chosen in similar_batches(items["tokens"], size, places):
            with torch.no_grad():
                inputs = self._prepare_inputs(self.data_collator([items[i] for i in chosen]))
                answered = self._answer(self.model, inputs)
            yield chosen, inputs, answered
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        self.model.train(was_training)

    def _reached(self) -> Iterable[int] | None:
        """Return the training pairs of a job that ends within an epoch; `None` is all."""
        if self._batches is None or self.args.max_steps <= 0:
            return None
        batches = islice(self._batches, self.args.max_steps * self.args.gradient_accumulation_steps)
        return sorted({place for batch in batches for place in batch})

    def _add_reference(self, items: Dataset, places: Iterable[int] | None = None) -> Dataset:
        """Return the items with what the model, as it is now, thinks of both answers.

        Args:
            items: Pairs.
            places: Of those that matter; with any other the loss would not be a number.
        """
        reference = np.full((len(_REFERENCE), len(items)), np.nan, dtype=np.float32)
        for batch, _, answered in self._answer_all(items, places):
            for row, sums in enumerate(answered.log_probs.sum(dim=1).chunk(2)):
                reference[row, batch] = sums.float().cpu().numpy()
        for name, column in zip(_REFERENCE, reference, strict=True):
            items = items.add_column(name, column)
        return items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return sum(len(batch["input_ids"]) // 2 for batch in batch_samples)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        # They are prepared; TRL's way would tokenize anew, and drop rows.
        return dataset


def as_item(pair: PreferencePair) -> dict[str, Any]:
    """Return what the trainer's data set holds of a pair."""
    return {
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "tokens": pair.longest,
    }


def _restore_dropout(model: Any, dropout: float) -> None:
    """Give the adapter its dropout back; TRL switches off that of the base model and all."""
    for module in model.modules():
        for layer in getattr(module, "lora_dropout", {}).values():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = dropout
