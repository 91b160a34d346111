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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from core.data.schema import Example
from core.data.tokenizer import template_of
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
    def trained_tokens(self) -> int:
        """Number of positions that count in the loss."""
        return sum(label != IGNORED_LABEL for label in self.labels)


def render_prompt(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> RenderedPrompt:
    """Render a conversation up to where the assistant's next turn begins.

    Raises:
        InvalidInput: Code `no_chat_template` or `template_refused`.
    """
    text = _render(messages, tokenizer, add_generation_prompt=True)
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
            `template_rewrites_content`, `template_without_end_token`, `control_token_in_content`
            or `token_crosses_border`.
    """
    if example.messages is None:
        text, spans = _find_completion(example, tokenizer)
    elif example.whole:
        _check_control_tokens(example.messages, tokenizer)
        text, spans = _render(example.messages, tokenizer, add_generation_prompt=False), []
    else:
        text, spans = _find_answers(example.messages, example.trained, tokenizer)
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
    messages: Sequence[Mapping[str, str]], trained: tuple[int, ...] | None, tokenizer: Any
) -> tuple[str, list[Span]]:
    _check_control_tokens(messages, tokenizer)
    text = _render(messages, tokenizer, add_generation_prompt=False)
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant" or (trained is not None and index not in trained):
            continue
        before = _render(messages[:index], tokenizer, add_generation_prompt=True)
        until = _render(messages[: index + 1], tokenizer, add_generation_prompt=False)
        if not (text.startswith(until) and until.startswith(before)):
            raise InvalidInput(
                "the chat template renders a conversation differently once it goes on",
                code="template_not_prefix_preserving",
                field=f"messages[{index}]",
                hint="Train on single-answer rows, or use a base model with another template.",
            )
        spans.append(Span(len(before), _end_of_answer(until, len(before), turn, tokenizer)))
    return text, spans


def _check_control_tokens(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> None:
    control = _control_tokens(tokenizer)
    for index, turn in enumerate(messages):
        for token in control:
            if token in turn["content"]:
                raise InvalidInput(
                    f"the text holds the control token {token!r}",
                    code="control_token_in_content",
                    field=f"messages[{index}].content",
                    hint="Send plain text; the chat template adds the control tokens.",
                )


def _end_of_answer(text: str, start: int, turn: Mapping[str, str], tokenizer: Any) -> int:
    """Return where the token ends that ends the answer, which begins at `start`."""
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
    ends = [
        (found, -len(token))
        for token in _special_tokens(tokenizer)
        if (found := text.find(token, after)) >= 0
    ]
    if not ends:
        raise InvalidInput(
            "the chat template ends the assistant's turns with no special token, so a model trained"
            " with it would not learn to stop",
            code="template_without_end_token",
            hint="Use a base model whose template ends turns with one, or prompt/completion rows.",
        )
    found, negative_length = min(ends)
    return found - negative_length


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


def _render(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, *, add_generation_prompt: bool
) -> str:
    if template_of(tokenizer) is None:
        raise InvalidInput(
            "the base model's tokenizer has no chat template, so it cannot read messages",
            code="no_chat_template",
            hint="Use prompt and completion, or a base model that was made for chat.",
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"the chat template refuses this conversation: {error}", code="template_refused"
        ) from error
    return str(rendered)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _encode_with_offsets(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _beginning(tokenizer: Any, text: str) -> str:
    token = tokenizer.bos_token
    if not token or text.startswith(token):
        return ""
    return token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def _special_tokens(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}


def _control_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens that structure a conversation; others may be plain words."""
    template = template_of(tokenizer) or ""
    own = (tokenizer.bos_token, tokenizer.eos_token)
    return sorted(
        token for token in _special_tokens(tokenizer) if token in template or token in own
    )
