"""The turns of a conversation, as rows spell them: read, checked one by one and in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.data.rows import Problem
from core.data.tools import check_calls, check_results, plain_calls

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TurnSpelling:
    """How a format names the members of a turn and the roles.

    Attributes:
        role: Member that holds the role.
        content: Member that holds the text.
        roles: Spelling → role.
        tools: Whether turns may call tools and tell their results.
    """

    role: str
    content: str
    roles: Mapping[str, str]
    tools: bool = False


CHAT = TurnSpelling("role", "content", {role: role for role in ROLES})
TOOL_CHAT = TurnSpelling("role", "content", {**CHAT.roles, "tool": "tool"}, tools=True)
SHAREGPT = TurnSpelling(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
    },
)


def check_conversation(value: Any, field: str, spelling: TurnSpelling) -> Iterator[Problem]:
    """Yield what is wrong with a list of turns that makes a whole conversation."""
    if not isinstance(value, list):
        yield Problem("wrong_type", f"{field!r} must be a list of turns", field)
        return
    if not value:
        yield Problem("empty", f"{field!r} has no turns", field)
        return
    where = [f"{field}[{index}]" for index in range(len(value))]
    yield from (
        list(check_turns(value, field, spelling))
        or list(check_order(value, where, spelling))
        or [*check_weights(value, field, spelling), *check_results(value, where)]
    )


def check_turns(turns: Sequence[Any], field: str, spelling: TurnSpelling) -> Iterator[Problem]:
    """Yield what is wrong with each turn by itself."""
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            yield Problem(
                "wrong_type",
                f"a turn must be an object with {spelling.role} and {spelling.content}",
                where,
            )
            continue
        role = turn.get(spelling.role)
        if not isinstance(role, str) or role not in spelling.roles:
            yield Problem(
                "unknown_role",
                f"the role is {_shorten(role)}; it must be {_or(list(spelling.roles))}",
                f"{where}.{spelling.role}",
            )
        calls = turn.get("tool_calls") if spelling.tools and role == "assistant" else None
        if calls is not None:
            yield from check_calls(calls, f"{where}.tool_calls")
        # An assistant that calls tools need not say anything.
        if calls is None or turn.get(spelling.content) not in (None, ""):
            yield from check_text(turn.get(spelling.content), f"{where}.{spelling.content}")
        yield from _check_weight(turn, f"{where}.weight", spelling)
        for name in {"name", "tool_call_id"}.intersection(_tool_members(role, spelling)):
            if not isinstance(turn.get(name) or "", str):
                yield Problem("wrong_type", "a text is needed here", f"{where}.{name}")
        known = {spelling.role, spelling.content, "weight", *_tool_members(role, spelling)}
        for name in turn:
            if name not in known and turn[name] is not None:
                yield Problem(
                    "unsupported_field",
                    f"a turn has the field {_shorten(name)}, which is not supported",
                    f"{where}.{name}"[:200],
                )


def check_order(
    turns: Sequence[Mapping[str, Any]], where: Sequence[str], spelling: TurnSpelling
) -> Iterator[Problem]:
    """Yield what is wrong with the roles: an optional system turn, then user and assistant.

    After an assistant's calls come the tools' results, and then the assistant again.
    """
    roles = [spelling.roles[turn[spelling.role]] for turn in turns]
    expected = "user"
    for index, role in enumerate(roles):
        if role == "tool" and index and expected == "assistant" and roles[index - 1] == "tool":
            continue
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
        calls = spelling.tools and role == "assistant" and turns[index].get("tool_calls")
        expected = "tool" if calls else "user" if role == "assistant" else "assistant"
    if roles[-1] != "assistant":
        yield Problem(
            "no_answer",
            "the last turn must be the assistant's, for there is nothing to learn after it",
            where[-1],
        )


def check_weights(
    turns: Sequence[Mapping[str, Any]], field: str, spelling: TurnSpelling
) -> Iterator[Problem]:
    """Yield a problem where weights leave nothing to learn."""
    if not trained_turns(turns, spelling):
        yield Problem("nothing_trained", "every answer has the weight 0", field)


def check_text(value: Any, field: str) -> Iterator[Problem]:
    """Yield what is wrong with a text that must not be empty."""
    if not isinstance(value, str):
        yield Problem("wrong_type", "a text is needed here", field)
    elif not value.strip():
        yield Problem("empty", "the text is empty", field)
    elif "\x00" in value:
        yield Problem("nul_byte", "the text holds a NUL character", field)
    elif not _is_encodable(value):
        yield Problem("bad_unicode", "the text holds half of a surrogate pair", field)


def plain_turns(turns: Sequence[Mapping[str, Any]], spelling: TurnSpelling) -> list[dict[str, Any]]:
    """Return checked turns as role and content, and what they have of tools."""
    return [_plain_turn(turn, spelling) for turn in turns]


def _plain_turn(turn: Mapping[str, Any], spelling: TurnSpelling) -> dict[str, Any]:
    role = spelling.roles[turn[spelling.role]]
    plain = {"role": role, "content": turn.get(spelling.content) or ""}
    for name in _tool_members(role, spelling):
        if turn.get(name):
            plain[name] = plain_calls(turn[name]) if name == "tool_calls" else turn[name]
    return plain


def trained_turns(turns: Sequence[Mapping[str, Any]], spelling: TurnSpelling) -> tuple[int, ...]:
    """Return the positions of the answers whose weight is not 0."""
    return tuple(
        index
        for index, turn in enumerate(turns)
        if spelling.roles[turn[spelling.role]] == "assistant" and turn.get("weight") != 0
    )


def _tool_members(role: Any, spelling: TurnSpelling) -> tuple[str, ...]:
    if not spelling.tools:
        return ()
    return {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}.get(str(role), ())


def _check_weight(turn: Mapping[str, Any], field: str, spelling: TurnSpelling) -> Iterator[Problem]:
    weight = turn.get("weight")
    if weight is None:
        return
    role = turn.get(spelling.role)
    if isinstance(role, str) and spelling.roles.get(role) != "assistant":
        yield Problem("unsupported_field", "only an assistant's turn has a weight", field)
    elif isinstance(weight, bool) or weight not in (0, 1):
        yield Problem("wrong_value", "the weight must be 0 or 1", field)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _shorten(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
