"""Tell the format of a data set from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from core.errors import InvalidInput

DatasetFormat = Literal["messages", "prompt_completion"]
FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)

FORMAT_HINT = (
    'Each row needs either "messages" (a list of {"role", "content"} turns) or "prompt" and '
    '"completion" (two texts, or two lists of turns).'
)


def detect_format(row: Mapping[str, Any], line: int) -> DatasetFormat:
    """Return the format that a row is in.

    Args:
        row: The first readable row of a data set; all others must be in its format.
        line: Its line, for the error.

    Raises:
        InvalidInput: Code `unknown_format`.
    """
    if "messages" in row:
        return "messages"
    if "prompt" in row or "completion" in row:
        return "prompt_completion"
    names = ", ".join(repr(name) for name in list(row)[:8]) or "no fields"
    raise InvalidInput(
        f"the format of the data set is not known: line {line} has {names}",
        code="unknown_format",
        line=line,
        hint=FORMAT_HINT,
    )
