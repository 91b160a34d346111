"""Log-probabilities that are reported with the tokens, of the logits as the model computed them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.inference.ranking import Floats, add_up, in_blocks, pack, top_k_floors, weigh


def describe(
    logits: Floats, token_ids: Sequence[int], most: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return for each row a token's log-probability, and the most probable tokens with theirs.

    Args:
        logits: Shape (rows, vocabulary), with finite greatest values.
        token_ids: The token of each row.
        most: How many of the most probable tokens of each row; best first, equal ones by id.
    """
    padded = in_blocks(logits)
    best = padded.max(axis=1)
    total = np.log(add_up(weigh(padded, best, np.ones(len(padded))))[:, -1])
    own = padded[np.arange(len(padded)), token_ids].astype(np.float64) - best - total
    counts = np.minimum(most, logits.shape[1])
    floors = top_k_floors(padded, np.maximum(counts, 1))
    values, ids = pack(padded, padded >= floors[:, None])
    order = np.argsort(-values, axis=1, kind="stable")[:, : counts.max()]
    values = np.take_along_axis(values, order, axis=1)
    ids = np.take_along_axis(ids, order, axis=1)
    logprobs = values.astype(np.float64) - best[:, None] - total[:, None]
    return [
        (logprob, list(zip(top_ids[:count], top[:count], strict=True)))
        for logprob, top_ids, top, count in zip(
            own.tolist(), ids.tolist(), logprobs.tolist(), counts.tolist(), strict=True
        )
    ]
