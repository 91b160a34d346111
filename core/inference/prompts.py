"""From a request to token ids: rendering, tokenising and fitting the context."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from core.data.rendering import encode_text, render_prompt
from core.data.rows import Problem
from core.data.tools import check_calls, check_tools, plain_calls
from core.errors import InvalidInput
from core.inference.engine import GenerateRequest, Message, SamplingParams

if TYPE_CHECKING:
    from core.inference.grammar import GrammarCompiler, Matcher


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt, and what may follow.

    Attributes:
        ids: The token ids.
        max_new_tokens: How many tokens may follow.
        matchers: One for each answer, if the answers must have a form.
    """

    ids: list[int]
    max_new_tokens: int
    matchers: list[Matcher] = field(default_factory=list)


class PromptEncoder:
    """Encodes prompts for one base model with one chat template; used from any thread.

    Args:
        tokenizer: The tokenizer, whose template renders messages.
        context_length: Tokens that prompt and answer may have together.
        vocabulary: Tokens that the model knows.
        grammars: Compiles the forms that answers must have.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: int,
        vocabulary: int,
        grammars: GrammarCompiler,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._vocabulary = vocabulary
        self._grammars = grammars
        # A look at all tokens takes longer than loading an adapter: once, for all templates.
        self._longest_token = max(map(len, tokenizer.get_vocab()))

    def with_template(self, template: str | None) -> Self:
        """Return an encoder that renders by another chat template, and is the same otherwise."""
        twin = copy.copy(self)
        twin._tokenizer = copy.copy(self._tokenizer)
        twin._tokenizer.chat_template = template
        return twin

    def limited_to(self, context_length: int) -> Self:
        """Return an encoder for a server that reads so many tokens at most."""
        twin = copy.copy(self)
        twin._context_length = min(self._context_length, context_length)
        return twin

    def encode(self, request: GenerateRequest) -> EncodedPrompt:
        """Return the request's prompt as token ids.

        Raises:
            InvalidInput: Code `prompt_required`, `empty_prompt`, `no_chat_template`,
                `template_refused`, `tools_unsupported`, `prompt_too_long`,
                `context_length_exceeded`, `min_new_tokens_too_large`, `unknown_token_id`,
                or those of `GrammarCompiler.compile`.
        """
        if (request.prompt is None) == (request.messages is None):
            raise InvalidInput(
                "give either 'prompt' or 'messages'", code="prompt_required", field="prompt"
            )
        source = "prompt" if request.messages is None else "messages"
        self._check_characters(request, source)
        sampling = request.sampling
        self._check_ids(sampling)
        if request.messages is None:
            ids = encode_text(request.prompt or "", self._tokenizer).ids
        else:
            turns = [
                _turn(message, f"messages[{index}]")
                for index, message in enumerate(request.messages)
            ]
            _refuse(check_tools(request.tools) if request.tools else ())
            ids = render_prompt(turns, self._tokenizer, request.tools).ids
        if not ids:
            raise InvalidInput("the prompt is empty", code="empty_prompt", field=source)
        matchers = self._grammars.compile(
            sampling.response_format, stop_ids=sampling.stop_token_ids, answers=sampling.n
        )
        return EncodedPrompt(ids, self._fit(len(ids), sampling, source), matchers)

    def _check_ids(self, sampling: SamplingParams) -> None:
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", list(sampling.logit_bias)),
        ):
            unknown = [token_id for token_id in ids if token_id >= self._vocabulary]
            if unknown:
                raise InvalidInput(
                    f"the model has no token {unknown[0]}",
                    code="unknown_token_id",
                    field=name,
                    hint=f"Its token ids are 0 to {self._vocabulary - 1}.",
                )

    def _fit(self, prompt_tokens: int, sampling: SamplingParams, field: str) -> int:
        context = self._context_length
        room = context - prompt_tokens
        if room < 1:
            raise self._too_long(f"{prompt_tokens:,}", field)
        wanted = sampling.max_new_tokens
        if "max_new_tokens" not in sampling.model_fields_set:
            wanted = min(wanted, room)
        if wanted > room:
            raise InvalidInput(
                f"{prompt_tokens:,} prompt tokens and {wanted:,} new tokens exceed the model's "
                f"context of {context:,}",
                code="context_length_exceeded",
                field="max_new_tokens",
                hint=f"Ask for at most {room:,} new tokens, or shorten the prompt.",
            )
        if sampling.min_new_tokens > wanted:
            raise InvalidInput(
                f"at least {sampling.min_new_tokens:,} new tokens are asked for, but only "
                f"{wanted:,} are allowed",
                code="min_new_tokens_too_large",
                field="min_new_tokens",
                hint="Lower min_new_tokens or raise max_new_tokens.",
            )
        return wanted

    def _check_characters(self, request: GenerateRequest, field: str) -> None:
        """Refuse what is too long by far before time is spent on tokenising it."""
        texts = [message.content for message in request.messages or ()]
        called = [message.tool_calls for message in request.messages or () if message.tool_calls]
        texts += [json.dumps(value) for value in (*called, request.tools) if value]
        characters = len(request.prompt or "") + sum(map(len, texts))
        if characters > (self._context_length + 1) * self._longest_token:
            raise self._too_long(f"more than {self._context_length:,}", field)

    def _too_long(self, tokens: str, field: str) -> InvalidInput:
        return InvalidInput(
            f"the prompt has {tokens} tokens; the model's context holds {self._context_length:,} "
            "including at least one new token",
            code="prompt_too_long",
            field=field,
            hint="Shorten the prompt, or use a model with a longer context.",
        )


def _turn(message: Message, where: str) -> dict[str, Any]:
    """Return a turn with the members it has, as rows of a data set have them."""
    turn = message.model_dump(exclude_none=True)
    if message.tool_calls is not None:
        _refuse(check_calls(turn["tool_calls"], f"{where}.tool_calls"))
        turn["tool_calls"] = plain_calls(turn["tool_calls"])
    return turn


def _refuse(problems: Iterable[Problem]) -> None:
    for problem in problems:
        raise InvalidInput(problem.message, code=problem.code, field=problem.field)
