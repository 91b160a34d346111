"""Tell the format of a data set from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from core.errors import InvalidInput

DatasetFormat = Literal["messages", "prompt_completion", "instruction", "sharegpt", "text"]
FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)

FORMAT_HINT = (
    'Each row needs "messages" (a list of {"role", "content"} turns), "prompt" and "completion" '
    '(two texts, or two lists of turns), "instruction" and "response" (or "output"), '
    '"conversations" (a list of {"from", "value"} turns) or "text".'
)


# In this order: a row of a conversation may also carry its text.
_SIGNS: tuple[tuple[DatasetFormat, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt_completion", ("prompt", "completion")),
    ("instruction", ("instruction",)),
    ("text", ("text",)),
)


def detect_format(row: Mapping[str, Any], line: int) -> DatasetFormat:
    """Return the format that a row is in.

    Args:
        row: The first readable row of a data set; all others must be in its format.
        line: Its line, for the error.

    Raises:
        InvalidInput: Code `unknown_format`.
    """
    for format, signs in _SIGNS:  # noqa: A001
        if any(name in row for name in signs):
            return format
    names = ", ".join(repr(name) for name in list(row)[:8]) or "no fields"
    raise InvalidInput(
        f"the format of the data set is not known: line {line} has {names}",
        code="unknown_format",
        line=line,
        hint=FORMAT_HINT,
    )
