"""Rows from which a tiny model can be seen to learn the right answers, or wrong ones."""

from __future__ import annotations

import random
from typing import Any

# Which animal goes with which word can be learnt; a row's own answer is as easy to read as any.
_ANSWERS = {
    "quick": "fox fox fox fox fox fox",
    "lazy": "dog dog dog dog dog dog",
    "capital": "Paris Paris Paris Paris",
    "assistant": "hello hello hello hello",
}


def judged_rows(count: int, *, first: int = 0, shuffled: bool = False) -> list[dict[str, Any]]:
    """Return rows whose answers follow from their questions, unless they are shuffled."""
    words = [list(_ANSWERS)[index % len(_ANSWERS)] for index in range(count)]
    answers = [_ANSWERS[word] for word in words]
    if shuffled:
        # Of other questions, and none of them as the right rows have it.
        random.Random(0).shuffle(answers)
        answers = [f"1 2 3 {answer[::-1]}" for answer in answers]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{first + index}: {word}?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for index, (word, answer) in enumerate(zip(words, answers, strict=True))
    ]
