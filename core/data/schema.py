"""What a row must look like in each format, and its meaning as an `Example`."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core.data.detect import DatasetFormat
from core.data.preference import check_preference, preference_turns
from core.data.rows import Problem
from core.data.tools import check_tools
from core.data.turns import (
    CHAT,
    SHAREGPT,
    TOOL_CHAT,
    check_conversation,
    check_order,
    check_text,
    check_turns,
    check_weights,
    plain_turns,
    trained_turns,
)

# Fields of other tools' formats that change what a row means; ignoring them would train wrongly.
_MEANINGFUL_FIELDS = (
    "tools", "functions", "images", "image", "audio", "weight", "chat_template_kwargs", "label",
    "chosen", "rejected",
)  # fmt: skip
# Of each format: its fields, each with all its spellings; of one field a row may use one spelling.
_REQUIRED: dict[DatasetFormat, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "prompt_completion": (("completion",), ("prompt",)),
    "instruction": (("instruction",), ("response", "output")),
    "sharegpt": (("conversations",),),
    "text": (("text",),),
    "preference": (("chosen",), ("rejected",)),
}
_OPTIONAL: dict[DatasetFormat, tuple[tuple[str, ...], ...]] = {
    "messages": (("tools",),),
    "instruction": (("context", "input"), ("system",)),
    "sharegpt": (("system",),),
    "preference": (("prompt",),),
}


@dataclass(frozen=True)
class Example:
    """A checked row: a conversation, or a text and its continuation.

    Attributes:
        messages: The turns; `None` for plain text.
        trained: Positions of the turns that may be trained; `None` means every assistant turn.
        prompt: Plain text before the completion; empty for a conversation.
        completion: Plain text to be learnt; empty for a conversation.
        whole: Everything is learnt, whatever `trained` says.
        rejected: Of a preference pair, the same prompt with the answer that was rejected.
        tools: Definitions of the tools that the assistant may call.
    """

    messages: list[dict[str, Any]] | None = None
    trained: tuple[int, ...] | None = None
    prompt: str = ""
    completion: str = ""
    whole: bool = False
    rejected: Example | None = None
    tools: list[dict[str, Any]] | None = None


def check_row(row: Mapping[str, Any], format: DatasetFormat) -> list[Problem]:  # noqa: A002
    """Return what is wrong with a row; an empty list means that `to_example` accepts it."""
    problems = [
        Problem("unsupported_field", f"the field {name!r} is not supported", name)
        for name in _MEANINGFUL_FIELDS
        if row.get(name) is not None
        and (name,) not in (*_REQUIRED[format], *_OPTIONAL.get(format, ()))
    ]
    missing = [
        Problem("missing_field", f"the field {' or '.join(map(repr, names))} is missing", names[0])
        for names in _REQUIRED[format]
        if not any(name in row for name in names)
    ]
    if missing:
        return problems + missing
    for names in (*_REQUIRED[format], *_OPTIONAL.get(format, ())):
        given = [name for name in names if row.get(name) is not None]
        if len(given) > 1:
            both = f"{given[0]!r} and {given[1]!r} mean the same field"
            problems.append(Problem("ambiguous_field", both, given[1]))
    return problems or list(_check_content(row, format))


def to_example(row: Mapping[str, Any], format: DatasetFormat) -> Example:  # noqa: A002
    """Return the meaning of a row in which `check_row` found no problem."""
    match format:
        case "messages":
            turns = row["messages"]
            return Example(
                messages=plain_turns(turns, TOOL_CHAT),
                trained=trained_turns(turns, TOOL_CHAT),
                tools=row.get("tools"),
            )
        case "sharegpt":
            turns = row["conversations"]
            system = _system_turn(row)
            trained = tuple(len(system) + index for index in trained_turns(turns, SHAREGPT))
            return Example(messages=system + plain_turns(turns, SHAREGPT), trained=trained)
        case "instruction":
            return Example(messages=_instruction_turns(row))
        case "text":
            return Example(completion=row["text"])
        case "prompt_completion":
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                return Example(prompt=prompt, completion=completion)
            trained = tuple(len(prompt) + index for index in trained_turns(completion, CHAT))
            return Example(messages=plain_turns(prompt + completion, CHAT), trained=trained)
        case "preference":
            return _preference(row)


def ignored_fields(row: Mapping[str, Any], format: DatasetFormat) -> set[str]:  # noqa: A002
    """Return the row's fields that have no influence on training."""
    used = {name for names in _REQUIRED[format] for name in names}
    used |= {name for names in _OPTIONAL.get(format, ()) for name in names}
    return set(row) - used


def lacks_field(names: Container[str], format: DatasetFormat) -> bool:  # noqa: A002
    """Tell whether a field that the format needs is under none of these names."""
    return not all(any(name in names for name in spelt) for spelt in _REQUIRED[format])


def _check_content(row: Mapping[str, Any], format: DatasetFormat) -> Iterator[Problem]:  # noqa: A002
    match format:
        case "messages":
            yield from check_conversation(row["messages"], "messages", TOOL_CHAT)
            if row.get("tools") is not None:
                yield from check_tools(row["tools"])
        case "sharegpt":
            turns = row["conversations"]
            yield from check_conversation(turns, "conversations", SHAREGPT)
            yield from _check_optional_text(row, "system")
            if _system_turn(row) and isinstance(turns, list) and turns:
                first = turns[0]
                if isinstance(first, dict) and first.get("from") == "system":
                    yield Problem("role_order", "there are two system turns", "conversations[0]")
        case "instruction":
            yield from check_text(row["instruction"], "instruction")
            answer = _spelling(row, "response", "output")
            yield from check_text(row.get(answer), answer)
            yield from _check_optional_text(row, _spelling(row, "context", "input"))
            yield from _check_optional_text(row, "system")
        case "text":
            yield from check_text(row["text"], "text")
        case "prompt_completion":
            yield from _check_pair(row["prompt"], row["completion"])
        case "preference":
            yield from check_preference(row)


def _check_pair(prompt: Any, completion: Any) -> Iterator[Problem]:
    if isinstance(prompt, str) and isinstance(completion, str):
        yield from check_text(prompt, "prompt")
        yield from check_text(completion, "completion")
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
    where = [f"prompt[{i}]" for i in range(len(prompt))]
    where += [f"completion[{i}]" for i in range(len(completion))]
    yield from (
        [*check_turns(prompt, "prompt", CHAT), *check_turns(completion, "completion", CHAT)]
        or list(check_order(prompt + completion, where, CHAT))
        or check_weights(completion, "completion", CHAT)
    )


def _preference(row: Mapping[str, Any]) -> Example:
    if isinstance(row["chosen"], str):
        rejected = Example(prompt=row["prompt"], completion=row["rejected"])
        return Example(prompt=row["prompt"], completion=row["chosen"], rejected=rejected)
    chosen, rejected_turns = preference_turns(row)
    trained = (len(chosen) - 1,)
    rejected = Example(messages=rejected_turns, trained=trained)
    return Example(messages=chosen, trained=trained, rejected=rejected)


def _check_optional_text(row: Mapping[str, Any], field: str) -> Iterator[Problem]:
    """Check a text that may be absent or empty, as exporters leave it."""
    value = row.get(field)
    if value is not None and value != "":
        yield from (p for p in check_text(value, field) if p.code != "empty")


def _instruction_turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    question = row["instruction"]
    context = row.get(_spelling(row, "context", "input"))
    if context and context.strip():
        question = f"{question}\n\n{context}"
    answer = row[_spelling(row, "response", "output")]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _system_turn(row) + turns


def _system_turn(row: Mapping[str, Any]) -> list[dict[str, str]]:
    text = row.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _spelling(row: Mapping[str, Any], *names: str) -> str:
    return next((name for name in names if row.get(name) is not None), names[0])
