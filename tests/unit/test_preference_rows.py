from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.check import check_rows
from core.data.dry_run import dry_run, examine
from core.data.pairs import PreferencePair, render_example
from core.data.rendering import encode_text, render_prompt, render_row
from core.data.schema import to_example
from core.data.sources import DataSource
from core.errors import InvalidInput
from core.specs import JobSpec
from tests.support.tiny_model import make_tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "What is the capital?"}
GOOD = {"role": "assistant", "content": "The capital is Paris."}
BAD = {"role": "assistant", "content": "No idea"}

TEXTS = {"prompt": "The capital is ", "chosen": "Paris", "rejected": "unknown"}
TURNS = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def render(row: dict[str, Any], tokenizer: Any) -> PreferencePair:
    report = check_rows([row])
    assert (report.format, report.errors) == ("preference", [])
    pair = render_example(to_example(row, "preference"), tokenizer)
    assert isinstance(pair, PreferencePair)
    return pair


@pytest.mark.parametrize("row", [TURNS, WHOLE, WHOLE | {"prompt": USER["content"]}])
def test_every_spelling_in_turns_gives_the_ids_that_serving_sends(
    row: dict[str, Any], tokenizer: Any
) -> None:
    pair = render(row, tokenizer)
    assert pair.prompt_ids == render_prompt([SYSTEM, USER], tokenizer).ids
    assert tokenizer.decode(pair.chosen_ids) == "The capital is Paris.<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids) == "No idea<|im_end|>"
    assert [pair.text[span.start : span.end] for span in pair.spans] == [
        "The capital is Paris.<|im_end|>"
    ]
    assert [pair.rejected_text[s.start : s.end] for s in pair.rejected_spans] == [
        "No idea<|im_end|>"
    ]


def test_texts_are_cut_where_the_prompt_ends(tokenizer: Any) -> None:
    pair = render(TEXTS, tokenizer)
    assert pair.prompt_ids == encode_text("The capital is ", tokenizer).ids
    assert tokenizer.decode(pair.chosen_ids) == "Paris<|im_end|>"
    assert pair.tokens == 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
    assert pair.longest == len(pair.prompt_ids) + len(pair.rejected_ids)


def test_an_answer_has_the_ids_of_a_row_with_that_answer(tokenizer: Any) -> None:
    pair = render(TURNS, tokenizer)
    example = to_example({"messages": [SYSTEM, USER, GOOD]}, "messages")
    row = render_row(example, tokenizer)
    ids = pair.prompt_ids + pair.chosen_ids
    assert row.input_ids[: len(ids)] == ids
    assert [label for label in row.labels if label >= 0] == pair.chosen_ids


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        (TEXTS | {"rejected": "Paris"}, "same_answer", "rejected"),
        (TURNS | {"rejected": [GOOD]}, "same_answer", "rejected"),
        (WHOLE | {"rejected": [USER, BAD]}, "prompts_differ", "rejected"),
        (WHOLE | {"prompt": "Another question"}, "prompts_differ", "prompt"),
        (WHOLE | {"prompt": 3}, "wrong_type", "prompt"),
        ({"chosen": "a", "rejected": "b"}, "missing_field", "prompt"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "wrong_type", "chosen"),
        ({"prompt": "a", "chosen": "a", "rejected": [BAD]}, "wrong_type", "rejected"),
        ({"prompt": "a", "chosen": {"x": 1}, "rejected": "b"}, "wrong_type", "chosen"),
        (TEXTS | {"chosen": " "}, "empty", "chosen"),
        (TURNS | {"chosen": []}, "empty", "chosen"),
        (TURNS | {"prompt": [USER, GOOD]}, "role_order", "chosen[0]"),
        (TURNS | {"rejected": [BAD, USER]}, "no_answer", "rejected[1]"),
        (TURNS | {"rejected": [BAD | {"weight": 0}]}, "nothing_trained", "rejected"),
        (TURNS | {"prompt": [SYSTEM | {"content": ""}, USER]}, "empty", "prompt[0].content"),
        (TEXTS | {"tools": [{}]}, "unsupported_field", "tools"),
    ],
)
def test_what_is_no_pair_is_found(row: dict[str, Any], code: str, field: str) -> None:
    found = [(error.code, error.field) for error in check_rows([TEXTS, row]).errors]
    assert (code, field) in found
    assert len(found) <= 2


def test_a_row_with_one_answer_among_pairs_is_found() -> None:
    report = check_rows([TEXTS, {"prompt": "a", "chosen": "b"}])
    assert [(error.line, error.code, error.field) for error in report.errors] == [
        (2, "missing_field", "rejected")
    ]


def write(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def job(method: str, **members: Any) -> JobSpec:
    return JobSpec.model_validate(
        {"base_model": "tiny", "dataset": "file-1", "method": {"type": method}} | members
    )


@pytest.mark.parametrize(
    ("method", "row", "other"),
    [("sft", TURNS, "dpo"), ("dpo", {"prompt": "a", "completion": "b"}, "sft")],
)
def test_a_method_refuses_rows_it_cannot_learn_from(
    tmp_path: Path, tokenizer: Any, method: str, row: dict[str, Any], other: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        dry_run(job(method), [DataSource(path=write(tmp_path, [row]))], tokenizer)
    assert (caught.value.code, caught.value.field) == ("method_format_mismatch", "method.type")
    assert other in (caught.value.hint or "")


def test_the_dry_run_shows_pairs(tmp_path: Path, tokenizer: Any) -> None:
    rows = [TURNS, WHOLE, TURNS | {"rejected": [GOOD | {"content": "Rome"}]}]
    spec = job("dpo", training={"max_length": 64}, data={"max_chars": {"assistant": 64}})
    report = dry_run(spec, [DataSource(path=write(tmp_path, rows))], tokenizer)
    pairs = [render(row, tokenizer) for row in rows]
    assert (report.valid, report.format, report.rows) == (True, "preference", 3)
    assert [(same.line, same.same_as_line) for same in report.duplicate_rows] == [(2, 1)]
    assert report.tokens is not None
    assert report.tokens.total == sum(pair.tokens for pair in pairs)
    assert report.trained_tokens == sum(
        len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs
    )
    assert report.sample is not None
    assert report.sample.text.endswith("The capital is Paris.<|im_end|>\n")
    assert report.sample.rejected_text == pairs[0].rejected_text
    assert report.sample.rejected_spans == [(s.start, s.end) for s in pairs[0].rejected_spans]


def test_filters_and_limits_see_both_answers(tmp_path: Path, tokenizer: Any) -> None:
    rows = [TURNS, TURNS | {"rejected": [BAD | {"content": "no " * 30}]}]
    path = write(tmp_path, rows)
    report = dry_run(
        job("dpo", data={"max_chars": {"assistant": 40}}), [DataSource(path=path)], tokenizer
    )
    assert (report.rows, report.dropped) == (1, {"max_chars.assistant": 1})
    limit = render(TURNS, tokenizer).longest
    report = examine(job("dpo", training={"max_length": limit}), [DataSource(path=path)], tokenizer)
    assert [(error.line, error.code) for error in report.errors] == [(2, "row_too_long")]


def test_a_system_prompt_stands_before_both_answers(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [TURNS | {"prompt": [USER]}])
    spec = job("dpo", data={"system_prompt": "Be brief."})
    sample = dry_run(spec, [DataSource(path=path)], tokenizer).sample
    assert sample is not None
    assert sample.rejected_text is not None
    assert "Be brief." in sample.text
    assert "Be brief." in sample.rejected_text
