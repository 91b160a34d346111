"""How good answers and losses are, in figures: exact match, ROUGE-L and bootstrap intervals.

Knows no model: texts and numbers come in, numbers go out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95
# Numbers drawn at a time, so that many rows take time and not memory.
_DRAWN_AT_ONCE = 1_000_000
# Written without blanks between words: each character counts as a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval at the level `CONFIDENCE`."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return the members for a report."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def bootstrap_mean(
    totals: NDArray[np.float64], counts: NDArray[np.float64], *, seed: int
) -> Interval:
    """Return the ratio of two sums over rows, with its percentile bootstrap interval.

    Whole rows are drawn with replacement (Efron, 1979), since the tokens of one row are not
    independent. A paired comparison is the interval of the rows' differences.

    Args:
        totals: One sum for each row, such as a difference of summed losses.
        counts: What each row's sum is over, such as its tokens.
        seed: Of the draws.
    """
    rows = len(totals)
    draws = np.random.default_rng(seed)
    means = []
    at_once = max(1, _DRAWN_AT_ONCE // rows)
    for start in range(0, RESAMPLES, at_once):
        drawn = draws.integers(rows, size=(min(at_once, RESAMPLES - start), rows))
        means.append(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(totals.sum() / counts.sum()), float(low), float(high))


def exact_match(answer: str, reference: str) -> bool:
    """Tell whether two texts are the same but for blanks and Unicode's ways to write a letter."""
    return _plain(answer) == _plain(reference)


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin, 2004), from 0 to 1.

    Words are runs of letters, marks and digits of any script, upper and lower case alike; in
    scripts that put no blanks between words each character is one. Texts without any word, such
    as emoji, score 1 if they match exactly.
    """
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs and exact_match(answer, reference))
    return 2 * _common_length(ours, theirs) / (len(ours) + len(theirs))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(text: str) -> list[str]:
    words, current = [], ""
    for character in unicodedata.normalize("NFKC", text).casefold():
        if _UNSPACED.match(character):
            words += [current, character]
            current = ""
        elif unicodedata.category(character)[0] in "LMN":
            current += character
        else:
            words.append(current)
            current = ""
    return [word for word in (*words, current) if word]


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bits (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()
