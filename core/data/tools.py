"""Tools in a conversation: their definitions, the assistant's calls, and what rows may say of them.

Spelled as in OpenAI's chat format. The arguments of a call may be an object or its JSON text;
templates get the object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.data.rows import Problem


def check_tools(tools: Any) -> Iterator[Problem]:
    """Yield what is wrong with a row's definitions of tools."""
    if not isinstance(tools, list) or not tools:
        yield Problem("wrong_type", "'tools' must be a list of tools", "tools")
        return
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or (tool.get("type") or "function") != "function":
            yield Problem(
                "wrong_type", 'a tool must be {"type": "function", "function": {…}}', where
            )
        elif not _is_name(function.get("name")):
            yield Problem("wrong_type", "a function needs a name", f"{where}.function.name")
        elif not isinstance(function.get("parameters") or {}, dict):
            yield Problem(
                "wrong_type", "the parameters must be an object", f"{where}.function.parameters"
            )


def check_calls(calls: Any, field: str) -> Iterator[Problem]:
    """Yield what is wrong with the tool calls of one turn."""
    if not isinstance(calls, list) or not calls:
        yield Problem("wrong_type", "'tool_calls' must be a list of calls", field)
        return
    for index, call in enumerate(calls):
        where = f"{field}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or (call.get("type") or "function") != "function":
            yield Problem(
                "wrong_type", 'a call must be {"type": "function", "function": {…}}', where
            )
        elif not _is_name(function.get("name")):
            yield Problem(
                "wrong_type", "a call needs the function's name", f"{where}.function.name"
            )
        elif _arguments(function.get("arguments")) is None:
            yield Problem(
                "invalid_arguments",
                "the arguments must be a JSON object, or its text",
                f"{where}.function.arguments",
            )
        elif not isinstance(call.get("id") or "", str):
            yield Problem("wrong_type", "the id of a call must be a text", f"{where}.id")


def check_results(turns: Sequence[Mapping[str, Any]], where: Sequence[str]) -> Iterator[Problem]:
    """Yield results of tools that answer no call; only where both sides have ids."""
    asked: set[str] = set()
    for turn, field in zip(turns, where, strict=True):
        if turn.get("role") == "assistant":
            asked |= {call["id"] for call in turn.get("tool_calls") or () if call.get("id")}
        answered = turn.get("tool_call_id")
        if turn.get("role") == "tool" and answered and asked and answered not in asked:
            yield Problem(
                "unknown_tool_call", "no earlier call has this id", f"{field}.tool_call_id"
            )


def plain_calls(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return checked calls with their arguments as objects."""
    return [
        {
            **({"id": call["id"]} if call.get("id") else {}),
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": _arguments(call["function"].get("arguments")),
            },
        }
        for call in calls
    ]


def speaks_of_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a conversation has calls or results of tools."""
    return any(turn["role"] == "tool" or turn.get("tool_calls") for turn in messages)


def _arguments(value: Any) -> dict[str, Any] | None:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
