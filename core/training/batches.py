"""From rendered rows to the tensors of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from core.data.rendering import IGNORED_LABEL


class PaddedBatch:
    """Collates rows of ids and labels, padded on the right.

    A row ends with the position that predicts its last trained token: nothing is learnt from what
    comes after, and no position sees what follows it.

    Args:
        pad_token_id: Fills `input_ids`; whether a position is padding is told by the mask alone,
            since the pad token may be one that is learnt.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the tensors of a batch, each of shape (rows, positions).

        `input_ids` and `attention_mask` as models take them; `targets`, at each position the token
        to be predicted there or the ignored label. Besides, as numbers, `row_tokens`, those of the
        whole rows, and `trained_tokens`.
        """
        ends = [_last_trained(row["labels"]) for row in rows]
        shape = (len(rows), max(1, *ends))
        input_ids = torch.full(shape, self._pad_token_id)
        targets = torch.full(shape, IGNORED_LABEL)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
            input_ids[index, :end] = torch.tensor(row["input_ids"][:end])
            targets[index, :end] = torch.tensor(row["labels"][1 : end + 1])
            attention_mask[index, :end] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "targets": targets,
            "row_tokens": sum(len(row["input_ids"]) for row in rows),
            "trained_tokens": int((targets != IGNORED_LABEL).sum()),
        }


def _last_trained(labels: Sequence[int]) -> int:
    """Return the index of the last trained token; 0 where no token can be learnt."""
    return next((at for at in range(len(labels) - 1, 0, -1) if labels[at] != IGNORED_LABEL), 0)
