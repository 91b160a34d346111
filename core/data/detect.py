"""Tell the format of a data set from its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from core.errors import InvalidInput

DatasetFormat = Literal[
    "messages", "prompt_completion", "instruction", "sharegpt", "text", "preference"
]
FORMATS: tuple[DatasetFormat, ...] = get_args(DatasetFormat)

FORMAT_HINT = (
    'Each row needs "messages" (a list of {"role", "content"} turns), "prompt" and "completion" '
    '(two texts, or two lists of turns), "instruction" and "response" (or "output"), '
    '"conversations" (a list of {"from", "value"} turns), "text", or "chosen" and "rejected" '
    '(answers to a "prompt", or whole lists of turns).'
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
    if all(name in row for name in ("chosen", "rejected")):
        # Such rows may carry the conversation or its prompt besides.
        return "preference"
    for format, signs in _SIGNS:  # noqa: A001
        if any(name in row for name in signs):
            return format
    names = ", ".join(repr(name) for name in list(row)[:8]) or "no fields"
    raise InvalidInput(
        f"the format of the data set is not known: line {line} has {names}",
        code="unknown_format",
        line=line,
        hint=f"{FORMAT_HINT} Columns of other names can be named in data.columns.",
    )


def check_method(method: str, format: DatasetFormat | None) -> None:  # noqa: A002
    """Check that a method can learn from rows of a format.

    Args:
        method: `sft` or `dpo`.
        format: `None` where it is not known yet.

    Raises:
        InvalidInput: Code `method_format_mismatch`.
    """
    if format is None or (method == "dpo") == (format == "preference"):
        return
    if format == "preference":
        raise InvalidInput(
            f"the rows are preference pairs, which the method {method!r} does not learn from",
            code="method_format_mismatch",
            field="method.type",
            hint='Use {"type": "dpo"}, or rows with one answer each.',
        )
    raise InvalidInput(
        f"the method {method!r} learns from preference pairs, and the rows are {format!r} rows",
        code="method_format_mismatch",
        field="method.type",
        hint='Send rows with "chosen" and "rejected", or use {"type": "sft"}.',
    )
