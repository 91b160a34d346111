"""Which rows go through the model together, and in which order: told by seed and epoch alone.

Padding costs as much as text, so a micro-batch should hold rows of similar length. An epoch is a
random order of the rows, cut into windows of some optimizer steps. Within a window the rows are
sorted by length, neighbours become the micro-batches, and these are dealt to the steps at random.
A step therefore has rows of all lengths, as in plain random order.

Nothing is remembered from epoch to epoch: a training that goes on from a checkpoint computes the
order of its epoch anew and skips what was done.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Sampler

from core.specs import JobSpec
from core.training.memory_ladder import BatchPlan

# A window. More would sort better, but the rows of a step would be less random; at 16 and steps of
# four rows the padding is about a hundredth.
_WINDOW_STEPS = 16


@dataclass(frozen=True)
class BatchOrder:
    """How the batches of an epoch are made.

    Attributes:
        seed: Of the job.
        rows_per_step: Of an optimizer step.
        group_rows: Neighbours in length that stay together: the rows that the job's description
            has in a forward pass, however few the memory ladder leaves of them.
        batch_size: Rows of a forward pass; divides `rows_per_step`.
        shuffle: Whether the order is random; else it is that of the file.
        group_by_length: Whether the rows of a batch are of similar length.
    """

    seed: int
    rows_per_step: int
    group_rows: int
    batch_size: int
    shuffle: bool = True
    group_by_length: bool = True

    def batches(self, lengths: Sequence[int], epoch: int) -> list[list[int]]:
        """Return the row indices of each micro-batch of an epoch, in order.

        The rows of an optimizer step do not depend on `batch_size`. Each row is in one batch; the
        last step has the rows that are left.
        """
        chance = random.Random(f"order-{self.seed}-{epoch}")
        order = list(range(len(lengths)))
        if self.shuffle:
            chance.shuffle(order)
        steps = [
            order[start : start + self.rows_per_step]
            for start in range(0, len(order), self.rows_per_step)
        ]
        if self.group_by_length:
            if self.shuffle:
                steps = self._deal(order, lengths, chance)
            steps = [_by_length(rows, lengths) for rows in steps]
        return [
            rows[start : start + self.batch_size]
            for rows in steps
            for start in range(0, len(rows), self.batch_size)
        ]

    def _deal(
        self, order: list[int], lengths: Sequence[int], chance: random.Random
    ) -> list[list[int]]:
        """Return the rows of each step, made of groups of similar length."""
        # The rows that fill no step are drawn like all others, not picked by their length.
        full = len(order) - len(order) % self.rows_per_step
        window_rows = self.rows_per_step * _WINDOW_STEPS
        steps: list[list[int]] = []
        for start in range(0, full, window_rows):
            window = _by_length(order[start : min(start + window_rows, full)], lengths)
            groups = [
                window[first : first + self.group_rows]
                for first in range(0, len(window), self.group_rows)
            ]
            chance.shuffle(groups)
            dealt = [index for group in groups for index in group]
            steps += [
                dealt[first : first + self.rows_per_step]
                for first in range(0, len(dealt), self.rows_per_step)
            ]
        return steps + ([order[full:]] if full < len(order) else [])


class EpochBatches(Sampler[list[int]]):
    """Yields the micro-batches of an epoch; a batch sampler for torch's data loader.

    Args:
        lengths: Tokens of each row.
        order: How the batches are made.
    """

    def __init__(self, lengths: Sequence[int], order: BatchOrder) -> None:
        self._lengths = list(lengths)
        self._order = order
        self._epoch = 0
        self.batch_size = order.batch_size
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield row indices, batch by batch."""
        return iter(self._order.batches(self._lengths, self._epoch))

    def __len__(self) -> int:
        """Return the number of batches, the same in each epoch."""
        return -(-len(self._lengths) // self.batch_size)


def order_batches(spec: JobSpec, plan: BatchPlan) -> BatchOrder:
    """Return how a job's batches are made on its rung of the memory ladder."""
    return BatchOrder(
        seed=spec.training.seed,
        rows_per_step=plan.batch_size * plan.gradient_accumulation_steps,
        group_rows=spec.training.batch_size,
        batch_size=plan.batch_size,
        shuffle=spec.data.shuffle,
        group_by_length=spec.data.group_by_length,
    )


def similar_batches(
    lengths: Sequence[int], size: int, places: Iterable[int] | None = None
) -> list[list[int]]:
    """Return batches of places with rows of similar length, to measure rows in any order.

    Args:
        lengths: Tokens of each row.
        size: Rows in a batch.
        places: Those wanted; `None` is all.
    """
    rows = _by_length(range(len(lengths)) if places is None else places, lengths)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _by_length(rows: Iterable[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lengths.__getitem__)
