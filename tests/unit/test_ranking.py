"""Finding the best tokens and their sums: against sorting, and the same in any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.inference.ranking import (
    BLOCK,
    add_up,
    find_places,
    ids_at,
    in_blocks,
    pack,
    top_k_floors,
    weigh,
)


def logits(seed: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@given(st.integers(0, 1000), st.integers(1, 300), st.sampled_from([300, 1000, 2000]))
def test_at_least_top_k_tokens_reach_the_floor(seed: int, top_k: int, size: int) -> None:
    raw = in_blocks(torch.stack([logits(seed, size), logits(seed + 1, size)]).numpy())
    wanted = np.array([min(top_k, size - 1), 3])
    reaching = raw >= top_k_floors(raw, wanted)[:, None]
    assert bool((reaching.sum(axis=1) >= wanted).all())
    assert bool((pack(raw, reaching)[0] > -np.inf).sum() == reaching.sum())


@given(st.integers(0, 1000), st.sampled_from([5, 128, 300]), st.booleans())
def test_a_token_is_found_by_its_place_from_the_best_down(
    seed: int, size: int, has_ties: bool
) -> None:
    raw = logits(seed, size)
    raw = raw.round() if has_ties else raw
    padded = in_blocks(raw.expand(size, size).numpy())
    falling = -np.sort(-padded, axis=1)
    expected = torch.sort(raw, descending=True, stable=True).indices
    assert ids_at(padded, falling, np.arange(size)).tolist() == expected.tolist()


def test_a_token_without_weight_is_never_drawn() -> None:
    for place in (0, 5, BLOCK, BLOCK + 5, 2 * BLOCK - 1):
        weights = np.zeros((4, 2 * BLOCK))
        weights[:, place] = 1.0
        reached = add_up(weights)
        points = np.array([0.0, 0.5, math.nextafter(1, 0), 7.0])
        assert set(find_places(weights, reached, points).tolist()) == {place}


@pytest.mark.parametrize("size", [1, 127, 129, 1000, 3001, 49_152])
@pytest.mark.parametrize("spread", [0.001, 3.0])
def test_sums_and_weights_of_a_row_are_the_same_to_the_last_bit_in_any_batch(
    size: int, spread: float
) -> None:
    raw = in_blocks((torch.stack([logits(row, size) for row in range(16)]) * spread).numpy())
    temperature = np.linspace(0.3, 3, 16)
    for rows in (2, 3, 8, 16):
        some = raw[-rows:]
        weights = weigh(some, some.max(axis=1), temperature[-rows:])
        reached = add_up(weights)
        for row in range(rows):
            one = some[row : row + 1].copy()
            own = weigh(one, one.max(axis=1), temperature[-rows:][row : row + 1])
            assert np.array_equal(own[0], weights[row])
            assert np.array_equal(add_up(own)[0], reached[row])
            # As after sorting a part only: what lies behind it changes nothing before.
            assert np.array_equal(add_up(own[:, :BLOCK].copy())[0], reached[row, :1])
