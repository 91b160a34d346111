"""Divide rows into training and validation sets, and count the steps that follow."""

from __future__ import annotations

import math
import random

from core.specs import DataSpec, TrainingSpec


def split_rows(count: int, spec: DataSpec, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the training and of the validation rows, each in file order.

    Which rows validate depends on the seed alone. A fraction above zero gives at least one
    validation row, unless no training row would be left.
    """
    wanted = math.floor(count * spec.validation_fraction + 0.5)
    if spec.validation_fraction > 0:
        wanted = max(1, wanted)
    wanted = min(wanted, count - 1) if count else 0
    validation = sorted(random.Random(f"validation-{seed}").sample(range(count), wanted))
    chosen = set(validation)
    return [index for index in range(count) if index not in chosen], validation


def repeat_rows(rows: list[int], weight: float, seed: str) -> list[int]:
    """Return the rows of one source as an epoch uses them.

    Each comes as often as the weight's whole part says, and those that the seed chooses once more
    for its fraction. A source that has rows has one in every epoch.
    """
    whole = math.floor(weight)
    more = math.floor(len(rows) * (weight - whole) + 0.5)
    if rows and not whole:
        more = max(1, more)
    chosen = sorted(random.Random(f"weight-{seed}").sample(range(len(rows)), more))
    return rows * whole + [rows[index] for index in chosen]


def count_steps(rows: int, spec: TrainingSpec) -> int:
    """Return the optimizer steps that training on `rows` rows takes.

    The last batches of an epoch make a step of their own, even if they are fewer.
    """
    if spec.max_steps is not None:
        return spec.max_steps
    batches = math.ceil(rows / spec.batch_size)
    per_epoch = math.ceil(batches / spec.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * spec.epochs))
