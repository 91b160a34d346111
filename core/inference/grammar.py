"""Answers of a given form: which tokens a JSON Schema or a regular expression allows next.

Owns what llguidance is told and how far it may go. Compiling is for the pools beside the engine
thread; the thread itself only asks for the tokens of the next step, which is bounded as well.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from core.errors import InvalidInput, TunesmithError
from core.inference.response_format import (
    MAX_SCHEMA_CHARACTERS,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
    TextFormat,
)

# By the library's own figures 5 ms for a step and 40 MB of states. The worst expressions that we
# tried took 100 ms beside the engine thread and 25 ms in one step; usual schemas take 0.1 ms.
_LIMITS: Any = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
}
# A model that has nothing to say would else write spaces until its limit.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}", "lenient": False}
# How llguidance says that one of the limits was reached.
_LIMIT_PHRASES = ("too many", "too large", "too big", "too complex", "; max is", "fuel", "limit")
_MAX_MESSAGE_CHARACTERS = 400


class Matcher:
    """Follows one answer and says which tokens may come next.

    Args:
        matcher: At the answer's beginning, used by nobody else.
        eos_ids: The model's end tokens, allowed as soon as the answer is complete.
        stop_ids: Further tokens that end the answer. Where they are text of the answer they stay
            allowed; besides, they are allowed where end tokens are.
    """

    def __init__(
        self, matcher: LLMatcher, eos_ids: Collection[int], stop_ids: Collection[int]
    ) -> None:
        self._matcher = matcher
        self._end_ids = frozenset(eos_ids) | frozenset(stop_ids)
        self._eos_index = np.array(sorted(eos_ids), np.int64)
        self._stop_index = np.array(sorted(stop_ids), np.int64)

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """Return which tokens can continue the answer, shape (vocabulary,).

        Raises:
            InvalidInput: Code `grammar_too_complex`: the step took more than a step may.
            TunesmithError: Code `grammar_dead_end`: none can.
        """
        mask = self._matcher.compute_bitmask()
        self._check()
        bits = np.frombuffer(mask, np.uint8)
        allowed = np.unpackbits(bits, count=vocabulary, bitorder="little").view(np.bool_)
        accepting = self._matcher.is_accepting()
        allowed[self._eos_index] = accepting
        if accepting:
            allowed[self._stop_index] = True
        if not allowed.any():
            raise TunesmithError("no token can continue the answer", code="grammar_dead_end")
        return allowed

    def accept(self, token_id: int) -> None:
        """Note the token that was chosen, one of those allowed."""
        if token_id not in self._end_ids and not self._matcher.consume_token(token_id):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error(), "response_format")


class GrammarCompiler:
    """Compiles response formats for one tokenizer; safe from any thread.

    Args:
        tokenizer: The base model's.
        eos_ids: Tokens that end an answer.
        vocabulary: Width of the model's logits.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def compile(
        self, wanted: ResponseFormat | None, *, stop_ids: Collection[int] = (), answers: int = 1
    ) -> list[Matcher]:
        """Return a matcher for each answer; none if any text will do.

        Raises:
            InvalidInput: Code `invalid_grammar`, `grammar_too_complex` or `grammar_unsupported`.
        """
        if wanted is None or isinstance(wanted, TextFormat):
            return []
        grammar, field = _source(wanted)
        first = LLMatcher(
            self._for_llguidance(),
            grammar,
            log_level=0,
            limits=LLParserLimits(verbose_errors=False, **_LIMITS),
        )
        if not first.is_error():
            # The first step does what the grammar left for later.
            first.compute_bitmask()
        if first.is_error():
            raise _refusal(first.get_error(), field)
        return [Matcher(first.deep_copy(), self._eos_ids, stop_ids) for _ in range(answers)]

    def _for_llguidance(self) -> LLTokenizer:
        with self._lock:
            if self._prepared is None:
                self._prepared = self._prepare()
            return self._prepared

    def _prepare(self) -> LLTokenizer:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        try:
            if backend is None:
                raise ValueError("it is not one of the tokenizers library")
            return LLTokenizer(
                backend.to_str(),
                n_vocab=max(self._vocabulary, len(self._tokenizer)),
                eos_token=sorted(self._eos_ids) or None,
            )
        except ValueError as error:
            raise InvalidInput(
                f"this model's tokenizer does not allow for it: {error}",
                code="grammar_unsupported",
                field="response_format",
                hint="Ask for the form in the prompt instead.",
            ) from error


def _source(wanted: ResponseFormat) -> tuple[str, str]:
    """Return llguidance's form of a response format, and the field that it came from."""
    if isinstance(wanted, RegexFormat):
        return LLMatcher.grammar_from_regex(wanted.regex), "response_format.regex"
    if not isinstance(wanted, JsonSchemaFormat):
        return _json_grammar({"type": "object"}), "response_format"
    field = "response_format.json_schema.schema"
    schema = wanted.json_schema.json_schema
    characters = len(json.dumps(schema, ensure_ascii=False))
    if characters > MAX_SCHEMA_CHARACTERS:
        raise InvalidInput(
            f"the schema has {characters:,} characters of JSON, more than the "
            f"{MAX_SCHEMA_CHARACTERS:,} that are allowed",
            code="grammar_too_complex",
            field=field,
            hint="Leave descriptions out, or ask for a part of it at a time.",
        )
    try:
        return _json_grammar(schema), field
    except ValueError as error:
        raise _refusal(str(error), field) from error


def _json_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)


def _refusal(message: str, field: str) -> InvalidInput:
    reason = message.removesuffix("<non-verbose/>").strip()[:_MAX_MESSAGE_CHARACTERS]
    if any(phrase in reason.lower() for phrase in _LIMIT_PHRASES):
        return InvalidInput(
            f"the form of the answer takes too much to follow: {reason}",
            code="grammar_too_complex",
            field=field,
            hint="Use fewer alternatives, optional members and nested repetitions.",
        )
    return InvalidInput(
        f"the form of the answer is not understood: {reason}",
        code="invalid_grammar",
        field=field,
        hint="Correct it; docs/serving.md says what can be enforced.",
    )
