"""Turn conversations and texts into tokens, for training and for serving alike.

The engine renders prompts with `render_prompt` and `encode_text`; training renders whole rows with
`render_row` so that what precedes a trained answer has exactly the ids of the prompt that serving
would send. Trained are the answer's text and the token that ends it, nothing after.

How an answer is found: the conversation up to a turn, rendered with the generation prompt, must be
a prefix of the whole text. What follows up to the end token is what the model has to write; it is
mapped to tokens by character offsets.

The hazard is a token that crosses the start of an answer: after the prompt "A: " the answer "yes"
would be read as one token " yes", which serving, given "A: ", asks nobody to produce. Such a row is
tokenised in pieces, cut where the answers start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.data.conversation import check_control_tokens, render_conversation, render_turns
from core.data.schema import Example
from core.data.templates import (
    Tools,
    adds_beginning,
    special_tokens,
    template_of,
)
from core.errors import InvalidInput

IGNORED_LABEL = -100


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model sees it: its text and its token ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of a rendered text."""

    start: int
    end: int


@dataclass(frozen=True)
class TrainingRow:
    """A row ready for training.

    Attributes:
        input_ids: Token ids.
        labels: The same ids where trained, -100 elsewhere.
        text: The rendered text.
        spans: The trained parts of `text`.
    """

    input_ids: list[int]
    labels: list[int]
    text: str
    spans: list[Span]

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the row reads."""
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """Tokens of its one sequence."""
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Number of positions that count in the loss."""
        return sum(label != IGNORED_LABEL for label in self.labels)


def render_prompt(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, tools: Tools | None = None
) -> RenderedPrompt:
    """Render a conversation up to where the assistant's next turn begins.

    Raises:
        InvalidInput: Code `no_chat_template`, `template_refused` or `tools_unsupported`.
    """
    text = render_conversation(messages, tokenizer, tools, add_generation_prompt=True)
    return RenderedPrompt(text, _encode(text, tokenizer))


def encode_text(text: str, tokenizer: Any) -> RenderedPrompt:
    """Tokenise a plain-text prompt, after the beginning token where the tokenizer uses one.

    The text is used as it is; a beginning token that it spells out itself is not doubled.
    """
    text = _beginning(tokenizer, text) + text
    return RenderedPrompt(text, _encode(text, tokenizer))


def render_row(example: Example, tokenizer: Any) -> TrainingRow:
    """Render a row and mask all but what the model is to learn.

    Raises:
        InvalidInput: Code `no_chat_template`, `template_refused`, `template_not_prefix_preserving`,
            `template_rewrites_content`, `template_without_end_token`, `control_token_in_content`,
            `tools_unsupported` or `token_crosses_border`.
    """
    if example.messages is None:
        text, spans = _find_completion(example, tokenizer)
    elif example.whole:
        check_control_tokens(example.messages, tokenizer, example.tools)
        text, spans = render_conversation(example.messages, tokenizer, example.tools), []
    else:
        text, spans = _find_answers(example.messages, example.trained, tokenizer, example.tools)
    if example.whole:
        ids = _encode(text, tokenizer)
        return TrainingRow(ids, list(ids), text, [Span(0, len(text))])
    ids, offsets, firsts = _tokenise(text, [span.start for span in spans], tokenizer)

    labels = [IGNORED_LABEL] * len(ids)
    for span, position in zip(spans, firsts, strict=True):
        while position < len(ids) and offsets[position][0] < span.end:
            labels[position] = ids[position]
            position += 1
    return TrainingRow(ids, labels, text, spans)


def end_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's own and that of its template.

    The two differ in models whose end-of-text token does not end a turn; generation must stop at
    either, since training teaches to write whichever the data's format ends with.
    """
    ids = {int(tokenizer.eos_token_id)}
    if template_of(tokenizer) is not None:
        probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        try:
            text, spans = _find_answers(probe, None, tokenizer)
        except InvalidInput:
            return frozenset(ids)
        ids.add(_encode(text[: spans[0].end], tokenizer)[-1])
    return frozenset(ids)


def _find_completion(example: Example, tokenizer: Any) -> tuple[str, list[Span]]:
    prompt = _beginning(tokenizer, example.prompt) + example.prompt
    end = tokenizer.eos_token
    completion = example.completion.removesuffix(end) + end
    text = prompt + completion
    return text, [Span(len(prompt), len(text))]


def _find_answers(
    messages: Sequence[Mapping[str, Any]],
    trained: tuple[int, ...] | None,
    tokenizer: Any,
    tools: Tools | None = None,
) -> tuple[str, list[Span]]:
    check_control_tokens(messages, tokenizer, tools)
    text = render_conversation(messages, tokenizer, tools)
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant" or (trained is not None and index not in trained):
            continue
        before = render_turns(messages[:index], tokenizer, tools, add_generation_prompt=True)
        whole = index + 1 == len(messages)
        until = text if whole else render_turns(messages[: index + 1], tokenizer, tools)
        if not (text.startswith(until) and until.startswith(before)):
            raise InvalidInput(
                "the chat template renders an answer differently once the conversation goes on",
                code="template_not_prefix_preserving",
                field=f"messages[{index}]",
                hint='Set data.train_on to "last", or use a base model with another template.',
            )
        spans.append(Span(len(before), _end_of_answer(until, len(before), turn, tokenizer)))
    return text, spans


def _end_of_answer(text: str, start: int, turn: Mapping[str, Any], tokenizer: Any) -> int:
    """Return where the token ends that ends the answer, which begins at `start`.

    Args:
        text: The conversation up to this turn, and not further.
    """
    content = turn["content"]
    at = text.find(content, start)
    if at < 0:
        content = content.strip()
        at = text.find(content, start)
    if at < 0:
        raise InvalidInput(
            "the chat template changes the assistant's text",
            code="template_rewrites_content",
            hint="Use a base model whose template keeps the text as it is.",
        )
    after = at + len(content)
    tail = text[after:]
    ends = [
        (found.start(), found.end())
        for token in special_tokens(tokenizer)
        if token in tail
        for found in re.finditer(re.escape(token), tail)
    ]
    if not ends:
        raise InvalidInput(
            "the chat template ends the assistant's turns with no special token, so a model trained"
            " with it would not learn to stop",
            code="template_without_end_token",
            hint="Use a base model whose template ends turns with one, or prompt/completion rows.",
        )
    if turn.get("tool_calls"):
        # Calls may be set off by special tokens of their own; the last one ends the turn.
        return after + max(end for _, end in ends)
    first = min(start for start, _ in ends)
    return after + max(end for start, end in ends if start == first)


def _tokenise(
    text: str, starts: list[int], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Return ids, character offsets and the index of the first token of each answer."""
    ids, offsets = _encode_with_offsets(text, tokenizer)
    prefixes = [_encode(text[:start], tokenizer) for start in starts]
    if all(ids[: len(prefix)] == prefix for prefix in prefixes):
        return ids, offsets, [len(prefix) for prefix in prefixes]

    cut_ids: list[int] = []
    cut_offsets: list[tuple[int, int]] = []
    firsts: list[int] = []
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        if start:
            firsts.append(len(cut_ids))
        piece_ids, piece_offsets = _encode_with_offsets(text[start:end], tokenizer)
        cut_ids += piece_ids
        cut_offsets += [(first + start, last + start) for first, last in piece_offsets]
    if tokenizer.decode(cut_ids) != tokenizer.decode(ids):
        # Tokenizers that mark the start of a text would put a blank before every answer.
        raise InvalidInput(
            "one token holds the end of the prompt and the start of the answer",
            code="token_crosses_border",
            hint="Move the blank or line break at the border from the prompt to the answer.",
        )
    return cut_ids, cut_offsets, firsts


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _encode_with_offsets(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _beginning(tokenizer: Any, text: str) -> str:
    token = tokenizer.bos_token
    if not token or text.startswith(token):
        return ""
    return str(token) if adds_beginning(tokenizer) else ""
