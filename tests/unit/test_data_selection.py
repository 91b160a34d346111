from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.data.dry_run import dry_run, render_dataset
from core.data.rendered import RenderedDataset
from core.data.rendering import IGNORED_LABEL, render_row
from core.data.schema import Example
from core.data.selection import prepare
from core.data.sources import DataSource
from core.errors import InvalidInput
from core.specs import DataSpec, JobSpec
from tests.support.tiny_model import make_tokenizer

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "blob"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dialogue(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def read(
    tmp_path: Path,
    rows: list[Any],
    data: DataSpec,
    tokenizer: Any,
    format: Any = None,  # noqa: A002
) -> RenderedDataset:
    spec = JobSpec(base_model="tiny", dataset="file-1", data=data)
    source = DataSource(path=write(tmp_path, rows), format=format)
    return render_dataset(spec, [source], tokenizer)


def test_filters_leave_out_rows_by_the_length_of_a_role_and_count_them(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [
        dialogue("q" * 9, "a" * 5),
        dialogue("q" * 10, "a" * 5),
        dialogue("q" * 11, "a" * 5),
        dialogue("q", "a" * 4),
        dialogue("q", "a" * 6),
    ]
    spec = DataSpec(
        min_chars={"assistant": 5}, max_chars={"user": 10, "assistant": 5}, shuffle=False
    )
    data = read(tmp_path, rows, spec, tokenizer)
    assert [row.line for row in data.rows] == [1, 2]
    assert data.dropped == {"max_chars.user": 1, "min_chars.assistant": 1, "max_chars.assistant": 1}
    assert data.seen == 5


def test_a_slice_is_taken_before_the_filters(tmp_path: Path, tokenizer: Any) -> None:
    rows = [dialogue(str(number), "a") for number in range(10)]
    spec = DataSpec(skip_rows=2, max_rows=3)
    data = read(tmp_path, rows, spec, tokenizer)
    assert [row.line for row in data.rows] == [3, 4, 5]
    assert data.dropped == {"skip_rows": 2, "max_rows": 5}


def test_rows_outside_the_slice_may_be_faulty(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": []}, dialogue("q", "a"), {"messages": []}]
    spec = DataSpec(skip_rows=1, max_rows=1)
    data = read(tmp_path, rows, spec, tokenizer, "messages")
    assert [row.line for row in data.rows] == [2]


def test_a_spec_that_leaves_nothing_says_what_left_it_out(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, [dialogue("q", "a")] * 3)
    spec = JobSpec.model_validate(
        {
            "base_model": "tiny",
            "dataset": "file-1",
            "data": {"skip_rows": 1, "min_chars": {"assistant": 2}},
        }
    )
    with pytest.raises(InvalidInput, match=r"min_chars\.assistant 2, skip_rows 1") as caught:
        dry_run(spec, [DataSource(path=path)], tokenizer)
    assert caught.value.code == "no_rows_left"


@pytest.mark.parametrize(
    ("train_on", "learnt"),
    [("assistant", ["two<|im_end|>", "four<|im_end|>"]), ("last", ["four<|im_end|>"])],
)
def test_what_is_learnt_of_a_conversation(tokenizer: Any, train_on: Any, learnt: list[str]) -> None:
    row = render_row(prepare(Example(messages=TURNS), DataSpec(train_on=train_on)), tokenizer)
    assert [row.text[span.start : span.end] for span in row.spans] == learnt
    assert tokenizer.decode([x for x in row.labels if x != IGNORED_LABEL]) == "".join(learnt)


def test_the_whole_text_may_be_learnt(tokenizer: Any) -> None:
    for example in (Example(messages=TURNS), Example(prompt="a ", completion="b")):
        row = render_row(prepare(example, DataSpec(train_on="all")), tokenizer)
        assert row.labels == row.input_ids
        assert tokenizer.decode(row.input_ids) == row.text


def test_a_text_row_is_learnt_whole_and_ended(tokenizer: Any) -> None:
    row = render_row(prepare(Example(completion="once upon"), DataSpec()), tokenizer)
    assert row.labels == row.input_ids
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_the_system_prompt_goes_before_conversations_that_have_none() -> None:
    spec = DataSpec(system_prompt="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    added = prepare(Example(messages=TURNS, trained=(3,)), spec)
    assert added.messages == [system, *TURNS]
    assert added.trained == (4,)
    own = [{"role": "system", "content": "Be short."}, *TURNS]
    assert prepare(Example(messages=own), spec).messages == own
    assert prepare(Example(prompt="a", completion="b"), spec).messages is None
