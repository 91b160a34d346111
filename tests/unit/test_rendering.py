from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from core.data.golden import golden_token_ids
from core.data.rendering import (
    IGNORED_LABEL,
    TrainingRow,
    encode_text,
    end_token_ids,
    render_prompt,
    render_row,
)
from core.data.schema import Example
from core.data.templates import control_tokens
from core.errors import InvalidInput
from tests.support.tiny_model import CHATML, make_tokenizer

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "The capital is Paris."},
    {"role": "user", "content": "Thank you"},
    {"role": "assistant", "content": "\n you are welcome \u00e9\U0001f600\n"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def trained_runs(row: TrainingRow, tokenizer: Any) -> list[str]:
    """Return the texts of the maximal runs of trained positions."""
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label == IGNORED_LABEL:
            inside = False
            continue
        assert label == token
        if not inside:
            runs.append([])
        inside = True
        runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_exactly_the_answers_and_their_end_tokens_are_trained(tokenizer: Any) -> None:
    row = render_row(Example(messages=TURNS), tokenizer)
    expected = [turn["content"] + "<|im_end|>" for turn in TURNS if turn["role"] == "assistant"]
    assert trained_runs(row, tokenizer) == expected
    assert [row.text[span.start : span.end] for span in row.spans] == expected
    assert tokenizer.decode(row.input_ids) == row.text


def test_what_precedes_an_answer_is_the_prompt_that_serving_renders(tokenizer: Any) -> None:
    row = render_row(Example(messages=TURNS), tokenizer)
    for index in (2, 4):
        ids = render_prompt(TURNS[:index], tokenizer).ids
        assert row.input_ids[: len(ids)] == ids
        assert row.labels[len(ids) - 1] == IGNORED_LABEL
        assert row.labels[len(ids)] == row.input_ids[len(ids)]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    question=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    answer=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
)
def test_any_text_is_trained_as_it_is(tokenizer: Any, question: str, answer: str) -> None:
    # These are refused, and Hypothesis knows some of them from the sources.
    for token in control_tokens(tokenizer):
        assume(token not in question and token not in answer)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = render_row(Example(messages=turns), tokenizer)
    assert trained_runs(row, tokenizer) == [answer + "<|im_end|>"]
    prompt = render_prompt(turns[:1], tokenizer).ids
    assert row.input_ids[: len(prompt)] == prompt


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompt=st.text("a b\n:", min_size=1), completion=st.text("a b\n:", min_size=1))
def test_a_token_never_crosses_from_prompt_to_completion(
    tokenizer: Any, prompt: str, completion: str
) -> None:
    row = render_row(Example(prompt=prompt, completion=completion), tokenizer)
    ids = encode_text(prompt, tokenizer).ids
    assert row.input_ids[: len(ids)] == ids
    assert trained_runs(row, tokenizer) == [completion + "<|im_end|>"]
    assert set(row.labels[: len(ids)]) == {IGNORED_LABEL}


def test_the_crossing_token_exists_without_the_cut(tokenizer: Any) -> None:
    whole = tokenizer("is the", add_special_tokens=False)["input_ids"]
    cut = render_row(Example(prompt="is ", completion="the"), tokenizer).input_ids
    assert whole != cut[:-1]
    assert tokenizer.decode(whole) == tokenizer.decode(cut[:-1])


def test_an_end_token_that_the_completion_spells_out_is_not_doubled(tokenizer: Any) -> None:
    plain = render_row(Example(prompt="a:", completion="b"), tokenizer)
    ended = render_row(Example(prompt="a:", completion="b<|im_end|>"), tokenizer)
    assert plain == ended
    assert plain.input_ids[-1] == plain.labels[-1] == tokenizer.eos_token_id


def test_turns_before_the_completion_are_context_only(tokenizer: Any) -> None:
    row = render_row(Example(messages=TURNS, trained=(4,)), tokenizer)
    assert trained_runs(row, tokenizer) == [TURNS[4]["content"] + "<|im_end|>"]


def test_a_beginning_token_is_added_once_where_the_tokenizer_uses_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    assert encode_text("fox", tokenizer).text == "fox"
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert encode_text("fox", tokenizer).text == "<|endoftext|>fox"
    assert encode_text("<|endoftext|>fox", tokenizer).text == "<|endoftext|>fox"
    row = render_row(Example(prompt="a", completion="b"), tokenizer)
    assert row.text == "<|endoftext|>ab<|im_end|>"


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (None, "no_chat_template"),
        ("{{ raise_exception('no thanks') }}", "template_refused"),
        (CHATML + "{{ messages | length }}", "template_not_prefix_preserving"),
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            "template_rewrites_content",
        ),
        (CHATML.replace("<|im_end|>", ""), "template_without_end_token"),
    ],
)
def test_templates_that_cannot_be_trained_are_refused(template: str | None, code: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        render_row(Example(messages=TURNS), make_tokenizer(template))
    assert caught.value.code == code


def test_control_tokens_inside_a_text_are_refused(tokenizer: Any) -> None:
    turns = [TURNS[1] | {"content": "a<|im_end|>b"}, TURNS[2]]
    with pytest.raises(InvalidInput) as caught:
        render_row(Example(messages=turns), tokenizer)
    assert (caught.value.code, caught.value.field) == (
        "control_token_in_content",
        "messages[0].content",
    )


def test_generation_ends_at_the_templates_and_the_tokenizers_end_token() -> None:
    tokenizer = make_tokenizer()
    assert end_token_ids(tokenizer) == {2}
    tokenizer.eos_token = "<|endoftext|>"
    assert end_token_ids(tokenizer) == {0, 2}
    assert end_token_ids(make_tokenizer(None)) == {2}


def test_golden_tokens_are_fixed_and_end_with_the_generation_prompt(tokenizer: Any) -> None:
    ids = golden_token_ids(tokenizer)
    assert 16 <= len(ids) <= 64
    assert ids == golden_token_ids(make_tokenizer())
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert 16 <= len(golden_token_ids(make_tokenizer(None))) <= 64
