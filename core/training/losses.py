"""The loss of each row by itself, which comparisons of base and adapter are made from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from core.data.rendering import IGNORED_LABEL, TrainingRow
from core.training.batches import PaddedBatch
from core.training.sampling import similar_batches
from core.training.trainer import as_item


@dataclass(frozen=True)
class RowLosses:
    """Of each row the summed loss and what it is summed over, in the order of the rows."""

    totals: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The loss over all tokens, not over rows."""
        return float(self.totals.sum() / self.counts.sum())


@torch.inference_mode()
def measure_losses(
    model: Any,
    rows: Sequence[TrainingRow],
    *,
    batch_rows: int,
    check_stop: Callable[[], None] = lambda: None,
) -> RowLosses:
    """Return the cross entropy of the trained tokens of each row.

    Args:
        model: A base model with an adapter, in evaluation mode.
        rows: At least one.
        batch_rows: Rows in a forward pass; they are of similar length.
        check_stop: Called before each pass; may raise to end early.
    """
    totals, counts = np.zeros(len(rows)), np.zeros(len(rows))
    for places in similar_batches([len(row.input_ids) for row in rows], batch_rows):
        check_stop()
        batch = [rows[index] for index in places]
        totals[places] = _sum_batch(model, batch)
        counts[places] = [sum(label != IGNORED_LABEL for label in row.labels[1:]) for row in batch]
    return RowLosses(totals, counts)


def _sum_batch(model: Any, rows: Sequence[TrainingRow]) -> NDArray[np.float64]:
    batch = PaddedBatch(pad_token_id=0)([as_item(row) for row in rows])
    targets = batch["targets"]
    arguments = {
        "input_ids": batch["input_ids"].to(model.device),
        "attention_mask": batch["attention_mask"].to(model.device),
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(type(model.get_base_model()).forward).parameters:
        # The output head is the largest product; of a conversation few positions are trained.
        trained = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        targets = targets[:, trained]
        logits = model(**arguments, logits_to_keep=trained.to(model.device)).logits
    else:
        logits = model(**arguments).logits
    # Row by row: the logits of a whole batch in float32 would take as much memory again.
    return np.array(
        [
            functional.cross_entropy(
                logits[index].float(),
                targets[index].to(logits.device),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            ).item()
            for index in range(len(rows))
        ]
    )
