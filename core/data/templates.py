"""Chat templates: the model's own, the one for models without, and what either does with turns.

A template may ask for the date. It is told always the same one, so that a conversation has the
same tokens in training, in a resumed training and in serving on any day.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from jinja2.exceptions import TemplateError

from core.artifacts import sha256_text
from core.errors import InvalidInput

Tools = Sequence[Mapping[str, Any]]

MARKERS: Final = ("<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# ChatML in which answers end with the model's own end token. The other markers are control tokens
# where the vocabulary has them and plain text elsewhere: no token is added.
_FALLBACKS: Final = (_CHATML, "{{ bos_token }}" + _CHATML)

# The day that Llama's templates fall back to.
PINNED_DATE: Final = datetime(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\s*\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")


def set_fallback(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template ChatML; one with a template keeps it."""
    if template_of(tokenizer) is None:
        tokenizer.chat_template = _FALLBACKS[adds_beginning(tokenizer)]


def template_of(tokenizer: Any) -> str | None:
    """Return the tokenizer's default chat template as text, or `None`."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def own_template(tokenizer: Any) -> str | None:
    """Return the template that came with the model, or `None` when it has the one from here."""
    return None if uses_fallback(tokenizer) else template_of(tokenizer)


def uses_fallback(tokenizer: Any) -> bool:
    """Tell whether the tokenizer's template is the one from here."""
    return template_of(tokenizer) in _FALLBACKS


def fallback_of(tokenizer: Any) -> str | None:
    """Return the template from here that the tokenizer has; `None` when it has its own."""
    return template_of(tokenizer) if uses_fallback(tokenizer) else None


def asks_for_date(tokenizer: Any) -> bool:
    """Tell whether the template puts the current date into a conversation."""
    return "strftime_now" in (template_of(tokenizer) or "")


def template_sha256(tokenizer: Any) -> str | None:
    """Return the SHA-256 of the model's own template, or `None` when it came without one."""
    template = own_template(tokenizer)
    return None if template is None else sha256_text(template)


def adds_beginning(tokenizer: Any) -> bool:
    """Tell whether the tokenizer puts a beginning token before a text."""
    if not tokenizer.bos_token:
        return False
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def apply_template(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    add_generation_prompt: bool,
    tools: Tools | None = None,
) -> str:
    """Return a conversation as the template spells it.

    Raises:
        InvalidInput: Code `no_chat_template`, `template_refused` or `template_dated`.
    """
    template = template_of(tokenizer)
    if template is None:
        raise InvalidInput(
            "the adapter was trained without a chat template, so it cannot read messages",
            code="no_chat_template",
            hint="Send the whole text as 'prompt'.",
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            chat_template=_pin_date(template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"the chat template refuses this conversation: {error}", code="template_refused"
        ) from error
    return str(rendered)


@lru_cache(maxsize=16)
def _pin_date(template: str) -> str:
    """Write the pinned date into a template, for which no clock can be passed."""
    pinned = _CLOCK.sub(lambda call: repr(PINNED_DATE.strftime(call["format"])), template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise InvalidInput(
            "the chat template writes the current date in a way that cannot be pinned",
            code="template_dated",
            hint="Use a base model whose template asks for the date with a plain format.",
        )
    return pinned


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the spellings of all special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}


def control_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that structure a conversation; other special tokens may be plain words."""
    template = template_of(tokenizer) or ""
    own = (tokenizer.bos_token, tokenizer.eos_token)
    found = {token for token in special_tokens(tokenizer) if token in template or token in own}
    # They structure a conversation as plain text as well.
    return sorted(found.union(MARKERS) if uses_fallback(tokenizer) else found)
