"""Drawing one token from one row of logits: temperature, top-k, top-p, min-p.

Gives the distribution of `transformers`' warpers in that order without sorting the vocabulary. The
full width is only passed over, with comparisons and one exponential; what is sorted and summed are
the few tokens that can be drawn. Sums are in float64. A row is computed by itself in the same
operations, so that its draw does not depend on how many others are in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Wide enough to leave few blocks, narrow enough to leave few candidates beside the wanted ones.
_BLOCK = 128
# Where the nucleus is looked for first, as a share of all probability.
_NUCLEUS_FLOORS = (1e-3, 1e-5)
_NOTHING = float("-inf")


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be drawn.

    Attributes:
        ids: Their ids, shape (candidates,).
        weights: Their probabilities up to a common factor, float64.
    """

    ids: Tensor
    weights: Tensor


def top_k_floors(logits: Tensor, top_k: int) -> Tensor:
    """Return for each row a value that at least `top_k` tokens reach, and few more.

    A value that `top_k` blocks of tokens reach with their best token is one.

    Args:
        logits: Shape (rows, vocabulary).
        top_k: Less than the vocabulary.

    Returns:
        Shape (rows,).
    """
    rows, vocabulary = logits.shape
    whole = vocabulary // _BLOCK * _BLOCK
    bests = logits[:, :whole].view(rows, -1, _BLOCK).amax(dim=2)
    if bests.shape[1] < top_k:
        return torch.topk(logits, top_k, dim=1).values[:, -1]
    return torch.topk(bests, top_k, dim=1).values[:, -1]


def find_candidates(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    floor: float | None = None,
) -> Candidates:
    """Return the tokens that may be drawn, with their weights, in an order of their own.

    Nucleus sampling as in Holtzman et al., 2020, min-p as in Nguyen et al., 2024. The best token
    always stays; what ties with the last of the `top_k` best stays as well.

    Args:
        logits: Shape (vocabulary,), float32, with a finite greatest value; -inf rules a token out.
        temperature: Above 0.
        top_k: 0 considers all tokens.
        top_p: 1 considers all tokens.
        min_p: 0 considers all tokens.
        floor: The row's value of `top_k_floors`, if it is known.
    """
    best = float(logits.max())
    if 0 < top_k < logits.numel():
        if floor is None:
            floor = float(top_k_floors(logits[None], top_k))
        ids = _at_least(logits, floor)
        values = logits[ids]
        if ids.numel() > top_k:
            kept = values >= torch.topk(values, min(top_k, ids.numel())).values[-1]
            ids, values = ids[kept], values[kept]
        weights = _weigh(values, best, temperature)
        total = float(weights.sum())
    elif top_p < 1:
        ids, weights, total = _nucleus_candidates(logits, best, temperature, top_p)
    else:
        lowest = best + temperature * (math.log(min_p) - 1) if min_p else _NOTHING
        ids = _at_least(logits, lowest)
        weights = _weigh(logits[ids], best, temperature)
        total = 0.0
    if top_p < 1:
        weights, order = torch.sort(weights, descending=True, stable=True)
        kept = weights.cumsum(0) - weights < top_p * total
        kept[0] = True
        ids, weights = ids[order][kept], weights[kept]
    if min_p:
        # The best token weighs 1, whatever else was ruled out.
        kept = weights >= min_p
        ids, weights = ids[kept], weights[kept]
    return Candidates(ids, weights)


def draw(candidates: Candidates, uniform: float) -> int:
    """Return the token at a point of the distribution.

    Args:
        candidates: The distribution.
        uniform: The point, from 0 to less than 1.
    """
    place, _ = _find_place(candidates.weights, uniform * float(candidates.weights.sum()))
    return int(candidates.ids[place])


def draw_from_all(logits: Tensor, temperature: float, uniform: float) -> int:
    """Return the token at a point of the distribution that rules nothing out.

    Blocks of tokens are summed first, so that only one block is looked at closely.

    Args:
        logits: As for `find_candidates`.
        temperature: Above 0.
        uniform: The point, from 0 to less than 1.
    """
    weights = (logits - logits.max()).div_(temperature).exp_()
    whole = weights.numel() // _BLOCK * _BLOCK
    blocks = weights[:whole].view(-1, _BLOCK).sum(dim=1, dtype=torch.float64)
    if whole < weights.numel():
        blocks = torch.cat([blocks, weights[whole:].sum(dtype=torch.float64)[None]])
    block, rest = _find_place(blocks, uniform * float(blocks.sum()))
    place, _ = _find_place(weights[block * _BLOCK : (block + 1) * _BLOCK].double(), rest)
    return block * _BLOCK + place


def _find_place(weights: Tensor, point: float) -> tuple[int, float]:
    """Return which weight covers a point of their sum, and how far into it the point is."""
    reached = weights.cumsum(0)
    # Rounding must not lead behind the last token, nor to one of weight 0.
    point = min(point, math.nextafter(float(reached[-1]), 0))
    place = int(torch.searchsorted(reached, point, right=True))
    return place, point - (float(reached[place - 1]) if place else 0.0)


def _at_least(logits: Tensor, lowest: float) -> Tensor:
    possible = logits > _NOTHING if lowest == _NOTHING else logits >= lowest
    return possible.nonzero().flatten()


def _weigh(values: Tensor, best: float, temperature: float) -> Tensor:
    # Relative to the best, so that a small temperature cannot overflow.
    return values.double().sub_(best).div_(temperature).exp_()


def _nucleus_candidates(
    logits: Tensor, best: float, temperature: float, top_p: float
) -> tuple[Tensor, Tensor, float]:
    """Return the most probable tokens, the nucleus among them, and what all tokens weigh."""
    total = float((logits - best).div_(temperature).exp_().sum(dtype=torch.float64))
    # All tokens below the last floor together have less than what the nucleus leaves out.
    last = (1 - top_p) / (2 * logits.numel())
    for share in (*(share for share in _NUCLEUS_FLOORS if share > last), last):
        ids = _at_least(logits, best + temperature * math.log(share * total))
        weights = _weigh(logits[ids], best, temperature)
        if ids.numel() and float(weights.sum()) >= top_p * total:
            break
    return ids, weights, total
