"""Drawing one token from each row of logits: temperature, top-k, top-p, min-p.

Gives the distribution of `transformers`' warpers in that order, for all rows at once. The full
width is only passed over, with comparisons and one exponential; what is sorted are the values of
the few tokens that can be drawn, or of the whole row where those are many. The token is looked up
last, by its value.

Owns what may be drawn and the draw. Knows nothing of answers and generators. What a row draws does
not depend on the others: their settings change only how many tokens are sorted that are ruled out
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.inference.engine import SamplingParams
from core.inference.ranking import (
    NOTHING,
    Doubles,
    Floats,
    Integers,
    add_up,
    find_places,
    ids_at,
    pack,
    take_rows,
    top_k_floors,
    weigh,
)

# The nucleus is looked for among tokens with at least this share of the probability that it leaves
# out. Few tokens have that much, and the others together seldom more than is left out.
_NUCLEUS_SHARE = 2e-4
# Sorting more than this part of a row by themselves takes longer than sorting all of it.
_FEW = 1 / 8


@dataclass(frozen=True)
class Cuts:
    """What limits the draws of several rows; every array has the shape (rows,).

    Attributes:
        temperature: Above 0.
        top_k: Less than the vocabulary; 0 considers all tokens.
        top_p: 1 considers all tokens.
        min_p: 0 considers all tokens.
    """

    temperature: Doubles
    top_k: Integers
    top_p: Doubles
    min_p: Doubles

    @classmethod
    def of(cls, settings: Sequence[SamplingParams], vocabulary: int) -> Cuts:
        """Return what the settings of each row say about this many tokens."""
        return cls(
            np.array([each.temperature for each in settings], np.float64),
            np.array([each.top_k if each.top_k < vocabulary else 0 for each in settings], np.int64),
            np.array([each.top_p for each in settings], np.float64),
            np.array([each.min_p for each in settings], np.float64),
        )

    def take(self, rows: Integers) -> Cuts:
        """Return those of some rows."""
        return Cuts(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


@dataclass(frozen=True)
class Candidates:
    """The best tokens of several rows, from the best one down.

    Attributes:
        values: Their logits, shape (rows, candidates).
        weights: Their probabilities up to a factor of the row; 0 for what is ruled out.
    """

    values: Floats
    weights: Doubles


def draw_tokens(logits: Floats, cuts: Cuts, uniforms: Doubles) -> Integers:
    """Return the token at a point of each row's distribution.

    Args:
        logits: Shape (rows, width), in blocks, with finite greatest values; -inf rules a token out.
        cuts: Of the rows.
        uniforms: The points, from 0 to less than 1, shape (rows,).
    """
    ids = np.empty(len(logits), np.int64)
    is_limited = (cuts.top_k > 0) | (cuts.top_p < 1) | (cuts.min_p > 0)
    free = np.flatnonzero(~is_limited)
    if free.size:
        own = take_rows(logits, free)
        weights = weigh(own, own.max(axis=1), cuts.temperature[free])
        reached = add_up(weights)
        ids[free] = find_places(weights, reached, uniforms[free] * reached[:, -1])
    limited = np.flatnonzero(is_limited)
    if limited.size:
        own = take_rows(logits, limited)
        for group, found in find_candidates(own, cuts.take(limited)):
            reached = add_up(found.weights)
            points = uniforms[limited[group]] * reached[:, -1]
            places = find_places(found.weights, reached, points)
            ids[limited[group]] = ids_at(take_rows(own, group), found.values, places)
    return ids


def find_candidates(logits: Floats, cuts: Cuts) -> Iterator[tuple[Integers, Candidates]]:
    """Yield the tokens that may be drawn, for some of the rows at a time, with those rows.

    Nucleus sampling as in Holtzman et al., 2020, min-p as in Nguyen et al., 2024. The best token
    always stays; what ties with the last of the `top_k` best stays as well.

    Args:
        logits: As for `draw_tokens`.
        cuts: Of the rows.
    """
    best = logits.max(axis=1)
    floors, totals, is_sure = _floors(logits, best, cuts)
    reaching = logits >= floors[:, None]
    is_done = np.count_nonzero(reaching, axis=1) <= _FEW * logits.shape[1]
    few = np.flatnonzero(is_done)
    if few.size:
        values, _ = pack(take_rows(logits, few), reaching[few])
        found, is_whole = _cut(values, best[few], cuts.take(few), totals[few])
        is_done[few] = is_enough = is_whole | is_sure[few]
        if is_enough.any():
            yield few[is_enough], Candidates(found.values[is_enough], found.weights[is_enough])
    many = np.flatnonzero(~is_done)
    if many.size:
        found, _ = _cut(take_rows(logits, many), best[many], cuts.take(many), totals[many])
        yield many, found


def _floors(logits: Floats, best: Floats, cuts: Cuts) -> tuple[Floats, Doubles, NDArray[np.bool_]]:
    """Return how far down candidates are looked for, what all tokens weigh, and what is sure.

    The totals are of those rows whose nucleus is one of all tokens. Only they may need tokens
    below the floor, unless `min_p` rules those out.
    """
    floors = np.full(len(logits), NOTHING)
    totals = np.zeros(len(logits))
    is_sure = np.ones(len(logits), np.bool_)
    smallest = np.flatnonzero((cuts.min_p > 0) & (cuts.top_k == 0))
    # A little lower, so that rounding leaves it to the weights what is ruled out.
    depth = cuts.temperature[smallest] * (np.log(cuts.min_p[smallest]) - 1)
    floors[smallest] = best[smallest] + depth
    nucleus = np.flatnonzero((cuts.top_p < 1) & (cuts.top_k == 0))
    if nucleus.size:
        own, temperature = best[nucleus], cuts.temperature[nucleus]
        totals[nucleus] = add_up(weigh(take_rows(logits, nucleus), own, temperature))[:, -1]
        share = _NUCLEUS_SHARE * (1 - cuts.top_p[nucleus])
        # The best token is always looked at, also where no token has that much.
        usual = own + temperature * np.log(np.minimum(share * totals[nucleus], 1))
        is_sure[nucleus] = floors[nucleus] >= usual
        floors[nucleus] = np.maximum(floors[nucleus], usual)
    counted = np.flatnonzero(cuts.top_k)
    if counted.size:
        floors[counted] = top_k_floors(take_rows(logits, counted), cuts.top_k[counted])
    return floors.astype(np.float32), totals, is_sure


def _cut(
    values: Floats, best: Floats, cuts: Cuts, totals: Doubles
) -> tuple[Candidates, NDArray[np.bool_]]:
    """Sort logits and rule out by top-k, top-p and min-p; tell which rows' nucleus is whole."""
    falling = -np.sort(-values, axis=1)
    if cuts.top_k.any():
        last = falling[np.arange(len(falling)), np.maximum(cuts.top_k - 1, 0)]
        last[cuts.top_k == 0] = NOTHING
        falling[falling < last[:, None]] = NOTHING
    weights = falling.astype(np.float64)
    weights -= best[:, None]
    weights /= cuts.temperature[:, None]
    np.exp(weights, out=weights)
    reached = add_up(weights)
    wanted = cuts.top_p * np.where(cuts.top_k > 0, reached[:, -1], totals)
    is_whole = reached[:, -1] >= wanted
    if (cuts.top_p < 1).any():
        # A token stays if those before it weigh less than is wanted.
        points = np.where(cuts.top_p < 1, np.nextafter(wanted, 0), np.inf)
        edges = find_places(weights, reached, points)
        weights[np.arange(weights.shape[1]) > edges[:, None]] = 0
    if cuts.min_p.any():
        # The best token weighs 1, whatever else was ruled out.
        weights[weights < cuts.min_p[:, None]] = 0
    return Candidates(falling, weights), is_whole
