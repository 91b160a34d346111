"""Answers of a given form: what may come next, when the answer may end, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from core.errors import InvalidInput, TunesmithError
from core.inference.engine import SamplingParams
from core.inference.grammar import GrammarCompiler, Matcher
from core.inference.response_format import MAX_SCHEMA_DEPTH, ResponseFormat
from core.inference.sampling import RowSampler, choose_tokens
from tests.support.tiny_model import make_tokenizer

TOKENIZER = make_tokenizer()
END, START = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|im_start|>")
# Models are often padded beyond their tokenizer.
VOCABULARY = 384
COMPILER = GrammarCompiler(TOKENIZER, {END}, VOCABULARY)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": value}}


def matchers(wanted: dict[str, Any], **options: Any) -> list[Matcher]:
    parsed: ResponseFormat = TypeAdapter(ResponseFormat).validate_python(wanted)
    return COMPILER.compile(parsed, **options)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def allowed(matcher: Matcher) -> set[int]:
    return set(matcher.allowed(VOCABULARY).nonzero()[0].tolist())


def follow(matcher: Matcher, text: str) -> Matcher:
    for token_id in ids_of(text):
        assert token_id in allowed(matcher), (text, TOKENIZER.decode([token_id]))
        matcher.accept(token_id)
    return matcher


def write(wanted: dict[str, Any], seed: int, limit: int = 400, **sampling: Any) -> str:
    """Return what a model without any sense writes in a given form."""
    [matcher] = matchers(wanted)
    params = SamplingParams(temperature=1.0, seed=seed, response_format=wanted, **sampling)
    sampler = RowSampler(params, 0, [], {END}, matcher)
    noise = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < limit:
        raw = torch.randn(VOCABULARY, generator=noise)
        raw[END] += 3
        [choice] = choose_tokens(raw[None], [sampler])
        if isinstance(choice, TunesmithError):
            raise choice
        ids.append(choice.token_id)
        if ids[-1] == END:
            return str(TOKENIZER.decode(ids[:-1]))
    raise AssertionError("the answer did not end")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_model_prefers_the_answer_fits_the_schema(seed: int) -> None:
    answer = json.loads(write(schema(PERSON), seed))
    assert set(answer) == {"name", "age"}
    assert isinstance(answer["age"], int)
    assert len(answer["name"]) <= 8


@pytest.mark.parametrize("seed", range(3))
def test_json_is_an_object_and_a_pattern_matches_from_end_to_end(seed: int) -> None:
    assert isinstance(json.loads(write({"type": "json_object"}, seed, limit=3000)), dict)
    pattern = r"(yes|no): [a-c]{2,5}!"
    assert re.fullmatch(pattern, write({"type": "regex", "regex": pattern}, seed))


def test_the_end_token_comes_only_when_the_answer_is_complete() -> None:
    [matcher] = matchers({"type": "regex", "regex": "ab?"})
    assert END not in allowed(matcher)
    assert END in allowed(follow(matcher, "a"))
    assert allowed(follow(matcher, "b")) == {END}


def test_a_stop_token_is_allowed_as_text_and_where_the_end_is() -> None:
    brace = ids_of("}")[0]
    wanted = {"type": "regex", "regex": "x}y"}
    [matcher] = matchers(wanted, stop_ids=[START, brace])
    assert not {START, brace} & allowed(matcher)
    assert allowed(follow(matcher, "x")) == {brace}
    [matcher] = matchers(wanted, stop_ids=[START])
    assert allowed(follow(matcher, "x}y")) == {END, START}


def test_the_answers_of_one_request_do_not_share_their_place() -> None:
    one, two = matchers({"type": "regex", "regex": "abc"}, answers=2)
    follow(one, "ab")
    assert ids_of("a")[0] in allowed(two)
    assert ids_of("c")[0] in allowed(one)


def test_the_minimum_length_waits_only_as_long_as_the_form_goes_on() -> None:
    long = write({"type": "regex", "regex": "a*"}, 1, min_new_tokens=30)
    assert len(ids_of(long)) >= 30
    assert write({"type": "regex", "regex": "yes"}, 1, min_new_tokens=30) == "yes"


def test_rows_of_a_batch_follow_their_own_forms_and_fail_alone() -> None:
    wanted: list[dict[str, Any]] = [
        {"type": "regex", "regex": "[ab]{40}"},
        {"type": "regex", "regex": "(a{1000}){1000}"},
        {"type": "regex", "regex": "[0-9]{40}"},
    ]

    def samplers() -> list[RowSampler]:
        params = SamplingParams(temperature=1.0, seed=3, top_p=0.9, logprobs=2)
        forms = [matchers(each)[0] for each in wanted]
        return [RowSampler(params, row, [], {END}, form) for row, form in enumerate([*forms, None])]

    together, alone = samplers(), samplers()
    raw = torch.randn(20, 4, VOCABULARY, generator=torch.Generator().manual_seed(1))
    texts = ["", "", "", ""]
    for step in raw:
        choices = choose_tokens(step, together)
        for row, choice in enumerate(choices):
            [own] = choose_tokens(step[row : row + 1], [alone[row]])
            if isinstance(choice, TunesmithError):
                assert isinstance(own, TunesmithError)
                assert (row, choice.code) == (1, own.code)
            else:
                assert choice == own
                texts[row] += TOKENIZER.decode([choice.token_id])
    assert not texts[1]
    assert re.fullmatch("[ab]{20,}", texts[0])
    assert re.fullmatch("[0-9]{20,}", texts[2])


def test_spaces_between_members_come_to_an_end() -> None:
    [matcher] = matchers({"type": "json_object"})
    follow(matcher, "{" + " " * 64)
    assert ids_of(" ")[0] not in allowed(matcher)
    assert ids_of("}")[0] in allowed(matcher)


def test_any_text_needs_no_matcher() -> None:
    assert matchers({"type": "text"}) == []
    assert COMPILER.compile(None) == []


@pytest.mark.parametrize(
    ("wanted", "field", "said"),
    [
        ({"type": "regex", "regex": "("}, "regex", "unclosed group"),
        ({"type": "regex", "regex": r"(?=a)b"}, "regex", "look-ahead"),
        ({"type": "regex", "regex": r"(a)\1"}, "regex", "backreferences"),
        (schema({"type": "nope"}), "json_schema.schema", "nope"),
        (schema({"type": "object", "if": {}}), "json_schema.schema", '"if"'),
        (schema({"$ref": "https://example.com/x"}), "json_schema.schema", "example.com"),
        (schema({"type": "integer", "minimum": 5, "maximum": 1}), "json_schema.schema", "minimum"),
        (schema({"properties": 5}), "json_schema.schema", "properties"),
        (schema({"type": "string", "pattern": "("}), "json_schema.schema", "unclosed group"),
        (
            schema({"type": "object", "if": {}, "x-guidance": {"lenient": True}}),
            "json_schema.schema",
            '"if"',
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    wanted: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        matchers(wanted)
    assert (refused.value.code, refused.value.field) == (
        "invalid_grammar",
        f"response_format.{field}",
    )
    assert said in refused.value.message


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "string"}


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "regex", "regex": "(a{1000}){1000}"},
        {"type": "regex", "regex": "(a?){1000}a{1000}"},
        schema({"description": "x" * 70_000}),
    ],
)
def test_what_would_take_too_much_is_refused_soon(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as refused:
        write(wanted, seed=1)
    assert refused.value.code == "grammar_too_complex"


def test_deep_schemas_do_no_harm() -> None:
    assert matchers(schema(nested(MAX_SCHEMA_DEPTH - 1)))
    with pytest.raises(ValidationError, match="nested"):
        matchers(schema(nested(400)))


def test_a_step_that_takes_too_much_fails_this_answer_with_the_reason() -> None:
    optional = {f"member{number}": {"type": "string"} for number in range(700)}
    [matcher] = matchers(schema({"type": "object", "properties": optional}))
    with pytest.raises(InvalidInput) as failed:
        follow(matcher, '{"member')
    assert (failed.value.code, failed.value.field) == ("grammar_too_complex", "response_format")


def test_other_tokenizers_are_refused() -> None:
    class Slow:
        def __len__(self) -> int:
            return 10

    with pytest.raises(TunesmithError) as refused:
        GrammarCompiler(Slow(), {END}, 10).compile(
            TypeAdapter(ResponseFormat).validate_python({"type": "json_object"})
        )
    assert refused.value.code == "grammar_unsupported"
