"""Write conversations as the chat template does, and see that it leaves nothing out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.data.templates import Tools, apply_template, control_tokens
from core.data.tools import speaks_of_tools
from core.errors import InvalidInput


def render_turns(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Tools | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return turns as the template writes them.

    Raises:
        InvalidInput: Code `no_chat_template`, `template_refused`, `template_dated` or
            `tools_unsupported`.
    """
    try:
        return apply_template(
            messages, tokenizer, add_generation_prompt=add_generation_prompt, tools=tools
        )
    except InvalidInput as error:
        if error.code == "template_refused" and (tools or speaks_of_tools(messages)):
            raise _tools_unsupported(error.message) from error
        raise


def render_conversation(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    tools: Tools | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return a whole conversation, in which the template left out nothing that tools need.

    Raises:
        InvalidInput: As `render_turns`.
    """

    def write(turns: Sequence[Mapping[str, Any]], known: Tools | None) -> str:
        return render_turns(turns, tokenizer, known, add_generation_prompt=add_generation_prompt)

    text = write(messages, tools)
    if tools and text == _or_none(write, messages, None):
        raise _tools_unsupported("the chat template leaves out the tools", "tools")
    for index, turn in enumerate(messages):
        if turn.get("tool_calls"):
            changed, field = {**turn, "tool_calls": []}, "tool_calls"
        elif turn["role"] == "tool":
            changed, field = {**turn, "content": turn["content"] + "."}, "content"
        else:
            continue
        other = [*messages[:index], changed, *messages[index + 1 :]]
        if text == _or_none(write, other, tools):
            raise _tools_unsupported(
                f"the chat template leaves out the {field.replace('_', ' ')} of a turn",
                f"messages[{index}].{field}",
            )
    return text


def _or_none(write: Callable[..., str], *arguments: Any) -> str | None:
    """Return what a template writes, or `None` where it insists on what was taken away."""
    try:
        return write(*arguments)
    except InvalidInput:
        return None


def _tools_unsupported(message: str, field: str | None = None) -> InvalidInput:
    return InvalidInput(
        message,
        code="tools_unsupported",
        field=field,
        hint="Use a base model whose chat template supports tools, or rows without them.",
    )


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def check_control_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, tools: Tools | None
) -> None:
    """Refuse texts that would open or close turns.

    Raises:
        InvalidInput: Code `control_token_in_content`.
    """
    texts = [(f"messages[{index}].content", turn["content"]) for index, turn in enumerate(messages)]
    texts += [
        (f"messages[{index}].tool_calls", _as_json(turn["tool_calls"]))
        for index, turn in enumerate(messages)
        if turn.get("tool_calls")
    ]
    if tools:
        texts.append(("tools", _as_json(tools)))
    for token in control_tokens(tokenizer):
        for field, text in texts:
            if token in text:
                raise InvalidInput(
                    f"the text holds the control token {token!r}",
                    code="control_token_in_content",
                    field=field,
                    hint="Send plain text; the chat template adds the control tokens.",
                )
