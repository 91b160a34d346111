"""What a file holds: rows, each with its place in the file or with what is wrong there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row.

    Attributes:
        code: Stable identifier, such as `malformed_json`.
        message: One sentence.
        field: Path inside the row, such as `messages[2].content`.
    """

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True)
class ParsedRow:
    """One row of a file: its object, or why there is none.

    Attributes:
        line: 1-based line that the row starts on.
        row: The object; empty where `problem` is set.
        problem: Why the row could not be read.
    """

    line: int
    row: dict[str, Any]
    problem: Problem | None = None
