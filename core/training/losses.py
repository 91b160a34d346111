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
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    for start in range(0, len(rows), batch_rows):
        check_stop()
        places = by_length[start : start + batch_rows]
        batch = [rows[index] for index in places]
        totals[places] = _sum_batch(model, batch)
        counts[places] = [sum(label != IGNORED_LABEL for label in row.labels[1:]) for row in batch]
    return RowLosses(totals, counts)


def _sum_batch(model: Any, rows: Sequence[TrainingRow]) -> NDArray[np.float64]:
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED_LABEL)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.tensor(row.input_ids)
        labels[index, :length] = torch.tensor(row.labels)
        attention_mask[index, :length] = 1
    targets = labels[:, 1:]
    arguments = {
        "input_ids": input_ids.to(model.device),
        "attention_mask": attention_mask.to(model.device),
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(type(model.get_base_model()).forward).parameters:
        # The output head is the largest product; of a conversation few positions are trained.
        trained = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        targets = targets[:, trained]
        logits = model(**arguments, logits_to_keep=trained.to(model.device)).logits
    else:
        logits = model(**arguments).logits[:, :-1]
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
