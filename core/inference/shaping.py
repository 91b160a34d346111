"""What changes logits before a token is chosen: penalties, bias, forms, and the minimum length.

Owns what an answer has seen and its settings for that, and applies those of many rows at once, in
this order: repetition penalty; presence and frequency penalty; logit bias; tokens ruled out by
`response_format`; end tokens ruled out by `min_new_tokens`. Knows nothing of draws.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from core.inference.engine import SamplingParams
from core.inference.ranking import NOTHING, Floats, Integers


class SeenTokens:
    """The tokens that occurred, and how often the answer has each of them.

    Args:
        prompt_ids: Tokens that occurred before the answer, which has none of them yet.
    """

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {id_: place for place, id_ in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array(list(self._places), np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)

    @property
    def ids(self) -> Integers:
        """Each token that occurred, once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        """How often the answer has each of `ids`."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Note a token of the answer."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            # Doubled, so that a long answer is copied only a few times.
            more = max(place, 64)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1


class Shaping:
    """What changes the logits of one answer.

    Args:
        sampling: The settings.
        prompt_ids: The prompt, which counts for the repetition penalty.
        end_ids: Tokens that end the answer, ruled out before `min_new_tokens`.

    Attributes:
        seen: What counts for the penalties; `None` if there are none.
        bias_ids: Tokens whose logits are changed, shape (biases,).
        bias: What is added to each, shape (biases,).
        end_ids: The end tokens, shape (end tokens,).
    """

    def __init__(
        self, sampling: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]
    ) -> None:
        self.repetition = sampling.repetition_penalty
        self.presence = sampling.presence_penalty
        self.frequency = sampling.frequency_penalty
        self.seen: SeenTokens | None = None
        if self.repetition != 1 or self.presence or self.frequency:
            self.seen = SeenTokens(prompt_ids if self.repetition != 1 else ())
        self.bias_ids = np.array(list(sampling.logit_bias), np.int64)
        self.bias = np.array(list(sampling.logit_bias.values()), np.float32)
        self.end_ids = np.array(sorted(end_ids), np.int64)
        self._still_waits = sampling.min_new_tokens

    @property
    def is_none(self) -> bool:
        """Whether nothing but the minimum length changes the logits."""
        return self.seen is None and not self.bias_ids.size

    @property
    def may_end(self) -> bool:
        """Whether the answer has its minimum length."""
        return self._still_waits <= 0

    def accept(self, token_id: int) -> None:
        """Note the token that was chosen."""
        self._still_waits -= 1
        if self.seen is not None:
            self.seen.add(token_id)


def shape_logits(
    logits: Floats, shapings: Sequence[Shaping], allowed: Mapping[int, NDArray[np.bool_]]
) -> None:
    """Change the logits of several rows in place.

    Args:
        logits: Shape (rows, width).
        shapings: One for each row.
        allowed: For rows that follow a form, which tokens continue it, (vocabulary,).
    """
    _penalise(logits, shapings)
    rows = [row for row, shaping in enumerate(shapings) if shaping.bias_ids.size]
    if rows:
        where = _pair(rows, [shapings[row].bias_ids for row in rows])
        logits[where] += np.concatenate([shapings[row].bias for row in rows])
    for row, tokens in allowed.items():
        np.copyto(logits[row, : len(tokens)], NOTHING, where=~tokens)
    rows = [row for row, each in enumerate(shapings) if not each.may_end and each.end_ids.size]
    if rows:
        _rule_out_ends(logits, *_pair(rows, [shapings[row].end_ids for row in rows]))


def penalise_repetition(logits: Floats, rows: Integers, ids: Integers, penalties: Floats) -> None:
    """Make tokens that occurred less likely, in place (CTRL, Keskar et al., 2019).

    Args:
        logits: Shape (rows, width).
        rows: The row of each token that occurred in prompt or answer, shape (tokens,).
        ids: Those tokens; in each row they differ.
        penalties: Positive logits are divided by it, negative ones multiplied; shape (tokens,).
    """
    seen = logits[rows, ids]
    logits[rows, ids] = np.where(seen > 0, seen / penalties, seen * penalties)


def penalise_presence(
    logits: Floats,
    rows: Integers,
    ids: Integers,
    counts: Floats,
    presence: Floats,
    frequency: Floats,
) -> None:
    """Lower the logits of tokens that the answer has, once and for each time, in place (OpenAI).

    Args:
        logits: Shape (rows, width).
        rows: The row of each token, shape (tokens,).
        ids: The tokens; in each row they differ.
        counts: How often the answer has each of them, shape (tokens,).
        presence: Taken off once if it has the token, shape (tokens,).
        frequency: Taken off as often as the token occurred, shape (tokens,).
    """
    logits[rows, ids] -= presence * (counts > 0) + frequency * counts


def _penalise(logits: Floats, shapings: Sequence[Shaping]) -> None:
    seen = [(row, each, each.seen) for row, each in enumerate(shapings) if each.seen is not None]
    if not seen:
        return
    tokens = [own.ids for _, _, own in seen]
    lengths = [len(ids) for ids in tokens]
    rows, ids = _pair([row for row, _, _ in seen], tokens)

    def spread(values: list[float]) -> Floats:
        return np.repeat(np.array(values, np.float32), lengths)

    # A penalty of 1, or of 0 below, changes nothing to the last bit.
    penalise_repetition(logits, rows, ids, spread([each.repetition for _, each, _ in seen]))
    penalise_presence(
        logits,
        rows,
        ids,
        np.concatenate([own.counts for _, _, own in seen]),
        spread([each.presence for _, each, _ in seen]),
        spread([each.frequency for _, each, _ in seen]),
    )


def _rule_out_ends(logits: Floats, rows: Integers, ids: Integers) -> None:
    ends = logits[rows, ids]
    logits[rows, ids] = NOTHING
    # What is complete and cannot go on ends, however short it is.
    stuck = logits.max(axis=1)[rows] == NOTHING
    logits[rows[stuck], ids[stuck]] = ends[stuck]


def _pair(rows: Sequence[int], ids: Sequence[Integers]) -> tuple[Integers, Integers]:
    """Return the ids of all rows one after the other, with the row of each."""
    return np.repeat(np.array(rows, np.int64), [len(each) for each in ids]), np.concatenate(ids)
