"""Finding the best tokens of many rows, and what all of them weigh, without sorting the vocabulary.

Owns the layout of logits that sampling works on: one array of shape (rows, width), each row padded
with -inf to whole blocks. Knows nothing of requests and settings.

Whatever is computed here for a row is the same to the last bit alone and in any batch: comparisons
and exponentials look at one number at a time, each block is summed by itself, and the sums of the
blocks are added up one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Weights = Floats | Doubles

# Wide enough to leave few blocks, narrow enough to leave few tokens to look at in one.
BLOCK = 128
NOTHING = float("-inf")


def take_rows(logits: Floats, rows: Integers | Sequence[int]) -> Floats:
    """Return some rows in their order, without a copy where they are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def in_blocks(logits: Floats) -> Floats:
    """Return a copy of logits of shape (rows, vocabulary), padded to whole blocks."""
    rows, vocabulary = logits.shape
    padded = np.empty((rows, -(-vocabulary // BLOCK) * BLOCK), np.float32)
    padded[:, :vocabulary] = logits
    padded[:, vocabulary:] = NOTHING
    return padded


def top_k_floors(logits: Floats, top_k: Integers) -> Floats:
    """Return for each row a value that at least `top_k` tokens reach, and few more.

    A value that `top_k` groups of tokens reach with their best token is one.

    Args:
        logits: Shape (rows, width), in blocks.
        top_k: Shape (rows,), from 1 to the width.

    Returns:
        Shape (rows,). Depends on the neighbours: the group is as wide as suits the greatest top-k.
    """
    rows, width = logits.shape
    group = BLOCK
    while group > 1 and width // group < 2 * top_k.max():
        group //= 2
    # Groups of tokens that lie far apart: the greatest of many runs of memory is fast to find.
    bests = logits.reshape(rows, group, -1).max(axis=1)
    places = bests.shape[1] - top_k
    floors: Floats = np.partition(bests, np.unique(places), axis=1)[np.arange(rows), places]
    return floors


def pack(logits: Floats, wanted: NDArray[np.bool_]) -> tuple[Floats, Integers]:
    """Return the wanted logits and their ids, side by side in each row.

    Args:
        logits: Shape (rows, width).
        wanted: The same shape.

    Returns:
        Two arrays of one shape (rows, most wanted in a row, in whole blocks). What is left over
        has the value -inf and the id 0.
    """
    rows, width = logits.shape
    found = np.flatnonzero(wanted)
    ends = np.searchsorted(found, np.arange(rows + 1) * width)
    counts = np.diff(ends)
    blocks = max(1, -(-int(counts.max()) // BLOCK))
    values = np.full((rows, blocks * BLOCK), NOTHING, np.float32)
    ids = np.zeros(values.shape, np.int64)
    begins = np.arange(rows) * values.shape[1]
    places = np.arange(len(found)) + np.repeat(begins - ends[:-1], counts)
    values.ravel()[places] = logits.ravel()[found]
    ids.ravel()[places] = found - np.repeat(np.arange(rows) * width, counts)
    return values, ids


def ids_at(logits: Floats, falling: Floats, places: Integers) -> Integers:
    """Return the tokens at places of the rows' order from the best token down.

    Equal logits are in the order of their ids.

    Args:
        logits: Shape (rows, width).
        falling: The values of at least as many of the best tokens, in that order, (rows, any).
        places: Shape (rows,).
    """
    values = falling[np.arange(len(places)), places]
    better = np.count_nonzero(falling > values[:, None], axis=1)
    begins = np.arange(len(places)) * logits.shape[1]
    equal = np.flatnonzero(logits == values[:, None])
    ids: Integers = equal[np.searchsorted(equal, begins) + places - better] - begins
    return ids


def weigh(logits: Floats, best: Floats, temperature: Doubles) -> Floats:
    """Return the probabilities of all tokens up to a factor; the best token weighs 1.

    Args:
        logits: Shape (rows, width).
        best: The greatest logit of each row, shape (rows,).
        temperature: Above 0, shape (rows,).
    """
    # Relative to the best, so that a small temperature cannot overflow.
    weights = logits - best[:, None]
    weights /= temperature.astype(np.float32)[:, None]
    np.exp(weights, out=weights)
    return weights


def add_up(weights: Weights) -> Doubles:
    """Return what a row weighs up to the end of each block, shape (rows, blocks).

    Args:
        weights: Shape (rows, width), in whole blocks.
    """
    blocks = weights.reshape(len(weights), -1, BLOCK).sum(axis=2)
    reached: Doubles = blocks.cumsum(axis=1, dtype=np.float64)
    return reached


def find_places(weights: Weights, reached: Doubles, points: Doubles) -> Integers:
    """Return which weight covers a point of each row's sum; only one block is looked at closely.

    Args:
        weights: Shape (rows, width), in whole blocks; not all of a row's are 0.
        reached: `add_up` of them.
        points: Shape (rows,), not negative; the last weight covers what lies behind it.
    """
    rows = np.arange(len(weights))
    # Rounding must not lead behind the last token, nor to one of weight 0.
    points = np.minimum(points, np.nextafter(reached[:, -1], 0))
    block = np.count_nonzero(reached <= points[:, None], axis=1)
    rest = points - np.where(block > 0, reached[rows, block - 1], 0)
    inside = weights.reshape(len(weights), -1, BLOCK)[rows, block]
    inside = inside.cumsum(axis=1, dtype=np.float64)
    rest = np.minimum(rest, np.nextafter(inside[:, -1], 0))
    places: Integers = block * BLOCK + np.count_nonzero(inside <= rest[:, None], axis=1)
    return places
