"""Prompts of a wanted number of tokens; none begins like another one."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.rendering import render_prompt
from core.data.tokenizer import load_tokenizer

# Each is one token behind a space, see `PromptMaker`.
_WORDS = (
    "water door light bread stone paper river house green small open window clear table garden "
    "letter simple copper summer winter number engine market train silver yellow bridge"
)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        messages: As a conversation.
        token_ids: The same, rendered and encoded.
    """

    messages: list[dict[str, str]]
    token_ids: list[int]


class PromptMaker:
    """Makes prompts for one model, always the same ones in the same order.

    Args:
        model_dir: Its tokenizer and template are used.
    """

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer: Any = load_tokenizer(model_dir)
        self._chance = random.Random(0)
        self._words = [
            word for word in _WORDS.split() if len(self._tokenizer.encode(f" {word}")) == 1
        ]
        self._made = 0

    def make(self, tokens: int) -> Prompt:
        """Return a new prompt of exactly this many tokens."""
        self._made += 1
        # Different from the start, so that nothing computed for another one can be taken over.
        start = [{"role": "system", "content": f"Case {self._made:06d}."}]
        missing = tokens - len(self._render([*start, {"role": "user", "content": "Explain"}]))
        text = " ".join(["Explain", *self._chance.choices(self._words, k=missing)])
        messages = [*start, {"role": "user", "content": text}]
        prompt = Prompt(messages, self._render(messages))
        assert len(prompt.token_ids) == tokens, (tokens, len(prompt.token_ids))
        return prompt

    def make_each(self, lengths: Iterable[int]) -> list[Prompt]:
        """Return a prompt of each of these lengths."""
        return [self.make(length) for length in lengths]

    def short(self, count: int) -> list[Prompt]:
        """Return prompts of 30 to 60 tokens, spread over that range."""
        return self.make_each(30 + (37 * number) % 31 for number in range(count))

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        text = render_prompt(messages, self._tokenizer).text
        return list(self._tokenizer.encode(text, add_special_tokens=False))
