"""What a row must look like in each format, and its meaning as an `Example`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.data.detect import DatasetFormat
from core.data.ingest import Problem

ROLES = ("system", "user", "assistant")
# Fields of other tools' formats that change what a row means; ignoring them would train wrongly.
_MEANINGFUL_FIELDS = (
    "tools", "functions", "images", "image", "audio", "weight", "chat_template_kwargs", "label",
    "chosen", "rejected",
)  # fmt: skip
_ROW_FIELDS: dict[DatasetFormat, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
}


@dataclass(frozen=True)
class Example:
    """A checked row: a conversation, or a text and its continuation.

    Attributes:
        messages: The turns; `None` for plain text.
        trained_from: Index of the first turn that may be trained; assistant turns before it are
            context only.
        prompt: Plain text before the completion; empty for a conversation.
        completion: Plain text to be learnt; empty for a conversation.
    """

    messages: list[dict[str, str]] | None = None
    trained_from: int = 0
    prompt: str = ""
    completion: str = ""


def check_row(row: Mapping[str, Any], format: DatasetFormat) -> list[Problem]:  # noqa: A002
    """Return what is wrong with a row; an empty list means that `to_example` accepts it."""
    problems = [
        Problem("unsupported_field", f"the field {name!r} is not supported", name)
        for name in _MEANINGFUL_FIELDS
        if row.get(name) is not None
    ]
    missing = [
        Problem("missing_field", f"the field {name!r} is missing", name)
        for name in sorted(_ROW_FIELDS[format])
        if name not in row
    ]
    if missing:
        return problems + missing
    if format == "messages":
        return problems + list(_check_conversation(row["messages"], "messages"))
    return problems + list(_check_pair(row["prompt"], row["completion"]))


def to_example(row: Mapping[str, Any], format: DatasetFormat) -> Example:  # noqa: A002
    """Return the meaning of a row in which `check_row` found no problem."""
    if format == "messages":
        return Example(messages=_plain(row["messages"]))
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return Example(prompt=prompt, completion=completion)
    return Example(messages=_plain(prompt + completion), trained_from=len(prompt))


def ignored_fields(row: Mapping[str, Any], format: DatasetFormat) -> set[str]:  # noqa: A002
    """Return the row's fields that have no influence on training."""
    return set(row) - _ROW_FIELDS[format]


def _plain(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _check_pair(prompt: Any, completion: Any) -> Iterator[Problem]:
    if isinstance(prompt, str) and isinstance(completion, str):
        yield from _check_text(prompt, "prompt")
        yield from _check_text(completion, "completion")
        return
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        yield Problem(
            "wrong_type",
            "'prompt' and 'completion' must be two strings or two lists of turns",
            "prompt" if not isinstance(prompt, str | list) else "completion",
        )
        return
    for name, turns in (("prompt", prompt), ("completion", completion)):
        if not turns:
            yield Problem("empty", f"{name!r} has no turns", name)
            return
    problems = [
        *_check_turns(prompt, "prompt"),
        *_check_turns(completion, "completion"),
    ]
    if problems:
        yield from problems
        return
    where = [f"prompt[{i}]" for i in range(len(prompt))]
    where += [f"completion[{i}]" for i in range(len(completion))]
    yield from _check_order(prompt + completion, where)


def _check_conversation(messages: Any, field: str) -> Iterator[Problem]:
    if not isinstance(messages, list):
        yield Problem("wrong_type", f"{field!r} must be a list of turns", field)
        return
    if not messages:
        yield Problem("empty", f"{field!r} has no turns", field)
        return
    problems = list(_check_turns(messages, field))
    yield from problems or _check_order(messages, [f"{field}[{i}]" for i in range(len(messages))])


def _check_turns(messages: list[Any], field: str) -> Iterator[Problem]:
    """Check each turn by itself."""
    for index, turn in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            yield Problem("wrong_type", "a turn must be an object with role and content", where)
            continue
        role = turn.get("role")
        if role not in ROLES:
            yield Problem(
                "unknown_role",
                f"the role is {_shorten(role)}; it must be system, user or assistant",
                f"{where}.role",
            )
        yield from _check_text(turn.get("content"), f"{where}.content")
        for name in turn:
            if name not in ("role", "content") and turn[name] is not None:
                yield Problem(
                    "unsupported_field",
                    f"a turn has the field {_shorten(name)}, which is not supported",
                    f"{where}.{name}"[:200],
                )


def _check_text(value: Any, field: str) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield Problem("wrong_type", "a text is needed here", field)
    elif not value.strip():
        yield Problem("empty", "the text is empty", field)
    elif "\x00" in value:
        yield Problem("nul_byte", "the text holds a NUL character", field)
    elif not _is_encodable(value):
        yield Problem("bad_unicode", "the text holds half of a surrogate pair", field)


def _check_order(messages: list[dict[str, str]], where: list[str]) -> Iterator[Problem]:
    """Check the sequence of roles: an optional system turn, then user and assistant by turns."""
    expected = "user"
    for index, turn in enumerate(messages):
        role = turn["role"]
        if role == "system":
            if index:
                yield Problem("role_order", "a system turn may only come first", where[index])
                return
            continue
        if role != expected:
            yield Problem(
                "role_order", f"expected a turn of the {expected}, not of the {role}", where[index]
            )
            return
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != "assistant":
        yield Problem(
            "no_answer", "the last turn must be the assistant's, for there is nothing to learn"
            " after it", where[-1],
        )  # fmt: skip


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shorten(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
