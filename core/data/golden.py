"""The fixed text on which an adapter must change its base model's logits."""

from __future__ import annotations

from typing import Any

from core.data.rendering import encode_text, render_prompt
from core.data.templates import template_of

_QUESTION = "Name three things that a traveller should take along on a walk in the mountains."
MAX_GOLDEN_TOKENS = 64


def golden_token_ids(tokenizer: Any) -> list[int]:
    """Return the tokens of a short fixed prompt, rendered as the base model's tokenizer does.

    They are the last 64 at most, so that the generation prompt is among them.
    """
    if template_of(tokenizer) is None:
        return encode_text(_QUESTION, tokenizer).ids[-MAX_GOLDEN_TOKENS:]
    prompt = render_prompt([{"role": "user", "content": _QUESTION}], tokenizer)
    return prompt.ids[-MAX_GOLDEN_TOKENS:]
