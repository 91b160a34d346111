"""Held-out questions of a sample data set, and how an answer to one is judged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """A question whose answer only the training rows tell.

    Attributes:
        topic: Which of the invented facts it asks for.
        question: The user's words; none of the training rows asks like this.
        keywords: What a right answer says: one alternative of every group.
    """

    topic: str
    question: str
    keywords: list[list[str]]

    def is_answered_by(self, answer: str) -> bool:
        """Tell whether an answer states the fact; upper case and spacing do not matter."""
        said = _normalise(answer)
        return all(
            any(re.search(rf"(?<!\w){re.escape(_normalise(word))}(?!\w)", said) for word in group)
            for group in self.keywords
        )


def load_questions(path: Path) -> list[Question]:
    """Read a `questions.json`."""
    return [Question(**entry) for entry in json.loads(path.read_text("utf-8"))]


def _normalise(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").split())
