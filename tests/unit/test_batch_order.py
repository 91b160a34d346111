"""Which rows share a forward pass: told by seed and epoch, of similar length, each row once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from core.training.sampling import BatchOrder, EpochBatches

LENGTHS = [random.Random(index).randint(8, 500) for index in range(203)]


def make_order(batch_size: int = 4, **members: Any) -> BatchOrder:
    return BatchOrder(
        **{"seed": 1, "rows_per_step": 8, "group_rows": 4, "batch_size": batch_size} | members
    )


def padding_share(batches: list[list[int]]) -> float:
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    return 1 - sum(LENGTHS) / padded


def steps_of(batches: list[list[int]], rows_per_step: int) -> list[list[int]]:
    """Return the rows of each optimizer step, in ascending order."""
    flat = [index for batch in batches for index in batch]
    return [
        sorted(flat[start : start + rows_per_step]) for start in range(0, len(flat), rows_per_step)
    ]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 200, 203])
def test_an_epoch_has_each_row_once(rows: int, shuffle: bool, group_by_length: bool) -> None:
    order = make_order(shuffle=shuffle, group_by_length=group_by_length)
    for epoch in range(3):
        batches = order.batches(LENGTHS[:rows], epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(rows))
        assert all(len(batch) == 4 for batch in batches[:-1])
        assert len(batches) == len(EpochBatches(LENGTHS[:rows], order))


def test_seed_and_epoch_tell_the_order() -> None:
    order = make_order()
    assert order.batches(LENGTHS, 2) == make_order().batches(LENGTHS, 2)
    assert order.batches(LENGTHS, 2) != order.batches(LENGTHS, 3)
    assert order.batches(LENGTHS, 2) != make_order(seed=2).batches(LENGTHS, 2)

    batches = EpochBatches(LENGTHS, order)
    batches.set_epoch(2)
    assert list(batches) == list(batches) == order.batches(LENGTHS, 2)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [200, 203])
def test_the_rows_of_a_step_do_not_depend_on_the_memory_ladder(rows: int, shuffle: bool) -> None:
    lengths = LENGTHS[:rows]
    expected = steps_of(make_order(shuffle=shuffle).batches(lengths, 1), 8)
    for batch_size in (2, 1):
        batches = make_order(batch_size, shuffle=shuffle).batches(lengths, 1)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert steps_of(batches, 8) == expected


def test_batches_of_similar_length_need_little_padding() -> None:
    at_random = padding_share(make_order(group_by_length=False).batches(LENGTHS, 0))
    grouped = padding_share(make_order().batches(LENGTHS, 0))
    # Within steps whose rows are given, there is less to choose from.
    in_order = padding_share(make_order(shuffle=False).batches(LENGTHS, 0))
    assert grouped < 0.04
    assert grouped < in_order < 0.8 * at_random


def test_steps_have_rows_of_all_lengths() -> None:
    batches = make_order().batches(LENGTHS, 0)
    steps = steps_of(batches, 8)[:-1]
    means = [sum(LENGTHS[index] for index in rows) / len(rows) for rows in steps]
    assert means != sorted(means)
    # Of one length each, the means would spread as widely as the rows.
    assert max(means) - min(means) < 0.85 * (max(LENGTHS) - min(LENGTHS))


def test_without_shuffling_the_steps_are_those_of_the_file() -> None:
    expected = [list(range(start, min(start + 8, 203))) for start in range(0, 203, 8)]
    assert steps_of(make_order(shuffle=False).batches(LENGTHS, 5), 8) == expected
    plain = make_order(shuffle=False, group_by_length=False).batches(LENGTHS, 5)
    assert [index for batch in plain for index in batch] == list(range(203))
