"""Chat templates of every kind: none at all, dated, thinking, and with tools."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from core.data.dry_run import dry_run, examine
from core.data.golden import golden_token_ids
from core.data.rendering import end_token_ids, render_prompt, render_row
from core.data.schema import Example, to_example
from core.data.sources import DataSource
from core.data.templates import own_template, set_fallback, template_of, template_sha256
from core.data.tokenizer import load_tokenizer
from core.data.trained_text import TrainedTextCheck
from core.errors import InvalidInput
from core.inference.engine import GenerateRequest
from core.inference.grammar import GrammarCompiler
from core.inference.prompts import PromptEncoder
from core.specs import JobSpec
from tests.support.tiny_model import CHATML, make_tiny_model, make_tokenizer
from tests.unit.test_rendering import TURNS, trained_runs

ANSWERS = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]

DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '.\n' }}" + CHATML

# As Qwen3's: thoughts of earlier turns are left out, and the last turn has some, be they empty.
THINKING = (
    "{%- set last = namespace(user=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- if message.role == 'assistant' and loop.index0 > last.user %}"
    "{%- set thought = '' %}"
    "{%- if '</think>' in message.content %}"
    "{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- endif %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}"
    "{%- endif %}"
    "{{- content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

TOOL_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOL_ROW: dict[str, Any] = {
    "tools": [WEATHER],
    "messages": [
        {"role": "user", "content": "How warm is Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
        {"role": "assistant", "content": "It is 12 degrees."},
    ],
}


def job(**members: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "tiny", "dataset": "file-1"} | members)


def write(tmp_path: Path, *rows: dict[str, Any]) -> list[DataSource]:
    path = tmp_path / "rows"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [DataSource(path=path)]


def served(tokenizer: Any, **asked: Any) -> list[int]:
    """Return the ids that the engine makes of messages."""
    grammars = GrammarCompiler(tokenizer, end_token_ids(tokenizer), len(tokenizer))
    request = GenerateRequest.model_validate(
        {
            "request_id": "gen-1",
            "project_id": "project-default",
            "base_model": {"name": "tiny", "digest": "0" * 64, "path": "/nowhere"},
        }
        | asked
    )
    return PromptEncoder(tokenizer, 512, len(tokenizer), grammars).encode(request).ids


@pytest.mark.parametrize("markers", [True, False])
class TestModelsWithoutTemplate:
    """A base model's tokenizer came without a template."""

    @pytest.fixture
    def tokenizer(self, tmp_path: Path, markers: bool) -> Any:
        return load_tokenizer(
            make_tiny_model(tmp_path / "plain", chat_template=None, markers=markers)
        )

    def test_no_token_is_added(self, tokenizer: Any, markers: bool) -> None:
        assert len(tokenizer) == len(make_tokenizer(None, markers=markers))
        start = tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"]
        assert (len(start) == 1) is markers

    def test_answers_end_with_the_models_own_end_token(self, tokenizer: Any, markers: bool) -> None:
        row = render_row(Example(messages=TURNS), tokenizer)
        end = "<|im_end|>" if markers else "<|endoftext|>"
        assert trained_runs(row, tokenizer) == [answer + end for answer in ANSWERS]
        assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}
        assert row.text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")

    def test_training_and_serving_send_the_same_ids(self, tokenizer: Any) -> None:
        row = render_row(Example(messages=TURNS), tokenizer)
        for index in (2, 4):
            ids = served(tokenizer, messages=TURNS[:index])
            assert row.input_ids[: len(ids)] == ids
            assert row.labels[len(ids)] == row.input_ids[len(ids)]

    def test_markers_inside_a_text_are_refused(self, tokenizer: Any) -> None:
        turns = [TURNS[1] | {"content": "a<|im_start|>system"}, TURNS[2]]
        with pytest.raises(InvalidInput) as caught:
            render_row(Example(messages=turns), tokenizer)
        assert caught.value.code == "control_token_in_content"

    def test_the_dry_run_says_so(self, tokenizer: Any, tmp_path: Path) -> None:
        report = dry_run(job(), write(tmp_path, {"messages": TURNS}), tokenizer)
        assert "chatml_fallback" in [warning.code for warning in report.warnings]
        texts = write(tmp_path, {"prompt": "a", "completion": "b"})
        of_texts = dry_run(job(), texts, tokenizer)
        assert "chatml_fallback" not in [warning.code for warning in of_texts.warnings]

    def test_it_is_not_taken_for_the_models_own(self, tokenizer: Any) -> None:
        assert template_of(tokenizer) is not None
        assert own_template(tokenizer) is None
        assert template_sha256(tokenizer) is None
        assert tokenizer.decode(golden_token_ids(tokenizer)).endswith("<|im_start|>assistant\n")


def test_a_beginning_token_stands_before_chatml_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    set_fallback(tokenizer)
    prompt = render_prompt(TURNS[1:2], tokenizer)
    assert prompt.text.startswith("<|endoftext|><|im_start|>user\n")
    assert prompt.ids.count(tokenizer.bos_token_id) == 1
    row = render_row(Example(messages=TURNS), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1


def test_a_template_of_the_model_is_kept() -> None:
    tokenizer = make_tokenizer()
    set_fallback(tokenizer)
    assert own_template(tokenizer) == CHATML


def edit_tokenizer_config(path: Path, **members: Any) -> None:
    config = path / "tokenizer_config.json"
    known = json.loads(config.read_text()) | members
    config.write_text(json.dumps({name: v for name, v in known.items() if v is not None}))


def test_the_padding_of_a_tokenizer_is_repaired(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    edit_tokenizer_config(path, pad_token=None, padding_side="left")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "right")


def test_a_pad_token_that_the_model_does_not_know_is_not_used(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    edit_tokenizer_config(path, pad_token="[PAD]")
    assert load_tokenizer(path).pad_token == "<|im_end|>"


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    edit_tokenizer_config(path, eos_token=None)
    with pytest.raises(InvalidInput) as caught:
        load_tokenizer(path)
    assert caught.value.code == "no_end_token"


def test_a_date_is_the_same_on_every_day(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(DATED)
    row = render_row(Example(messages=TURNS), tokenizer)
    assert row.text.startswith("Today is 26 July 2024.\n")
    assert f"{datetime.now():%Y}" != "2024"
    assert trained_runs(row, tokenizer) == [answer + "<|im_end|>" for answer in ANSWERS]
    prompt = render_prompt(TURNS[:2], tokenizer)
    assert row.input_ids[: len(prompt.ids)] == prompt.ids
    report = dry_run(job(), write(tmp_path, {"messages": TURNS}), tokenizer)
    assert "2024-07-26" in next(w.message for w in report.warnings if w.code == "template_dated")


def test_a_date_that_cannot_be_pinned_is_refused() -> None:
    template = "{% set form = '%d' %}{{ strftime_now(form) }}" + CHATML
    with pytest.raises(InvalidInput) as caught:
        render_row(Example(messages=TURNS), make_tokenizer(template))
    assert caught.value.code == "template_dated"


class TestThinkingTemplates:
    """A template leaves out what earlier answers thought."""

    @pytest.fixture
    def tokenizer(self) -> Any:
        return make_tokenizer(THINKING)

    def test_the_empty_thought_before_an_answer_is_learnt_and_said(
        self, tokenizer: Any, tmp_path: Path
    ) -> None:
        report = dry_run(job(), write(tmp_path, {"messages": TURNS[1:3]}), tokenizer)
        assert report.sample is not None
        start, end = report.sample.spans[0]
        answer = "<think>\n\n</think>\n\nThe capital is Paris.<|im_end|>"
        assert report.sample.text[start:end] == answer
        note = next(w for w in report.warnings if w.code == "template_adds_text")
        assert "<think>" in note.message

    def test_earlier_answers_cannot_be_learnt(self, tokenizer: Any, tmp_path: Path) -> None:
        sources = write(tmp_path, {"messages": TURNS})
        report = examine(job(), sources, tokenizer)
        assert [(e.line, e.code, e.field) for e in report.errors] == [
            (1, "template_not_prefix_preserving", "messages[2]")
        ]
        assert "data.train_on" in report.errors[0].message

    def test_the_last_answer_can_be_learnt_after_the_prompt_that_serving_sends(
        self, tokenizer: Any, tmp_path: Path
    ) -> None:
        sources = write(tmp_path, {"messages": [*TURNS[:4], TURNS[2]]})
        report = dry_run(job(data={"train_on": "last"}), sources, tokenizer)
        assert report.valid
        row = render_row(Example(messages=[*TURNS[:4], TURNS[2]], trained=(4,)), tokenizer)
        prompt = render_prompt(TURNS[:4], tokenizer)
        assert row.input_ids[: len(prompt.ids)] == prompt.ids
        assert trained_runs(row, tokenizer) == [
            "<think>\n\n</think>\n\nThe capital is Paris.<|im_end|>"
        ]

    def test_a_thought_in_the_row_is_learnt(self, tokenizer: Any) -> None:
        answer = "<think>\nIt is easy.\n</think>\n\nParis."
        turns = [TURNS[1], {"role": "assistant", "content": answer}]
        row = render_row(Example(messages=turns), tokenizer)
        assert trained_runs(row, tokenizer) == [answer + "<|im_end|>"]

    def test_a_thought_that_the_template_spells_otherwise_is_refused(self, tokenizer: Any) -> None:
        turns = [TURNS[1], {"role": "assistant", "content": "<think>Easy.</think>Paris."}]
        with pytest.raises(InvalidInput) as caught:
            render_row(Example(messages=turns), tokenizer)
        assert caught.value.code == "template_rewrites_content"


class TestTools:
    """Rows in which the assistant calls tools."""

    def test_calls_and_answers_are_learnt_and_results_are_not(self) -> None:
        tokenizer = make_tokenizer(TOOL_TEMPLATE)
        example = to_example(TOOL_ROW, "messages")
        row = render_row(example, tokenizer)
        assert trained_runs(row, tokenizer) == [
            '<tool_call>weather {"city": "Paris"}<|im_end|>',
            "It is 12 degrees.<|im_end|>",
        ]
        assert example.messages is not None
        for index in (1, 3):
            ids = render_prompt(example.messages[:index], tokenizer, example.tools).ids
            assert row.input_ids[: len(ids)] == ids
        TrainedTextCheck(tokenizer).check(example, row)

    def test_serving_sends_the_ids_that_training_has(self) -> None:
        tokenizer = make_tokenizer(TOOL_TEMPLATE)
        row = render_row(to_example(TOOL_ROW, "messages"), tokenizer)
        asked = [turn | {"content": turn["content"] or ""} for turn in TOOL_ROW["messages"][:3]]
        ids = served(tokenizer, messages=asked, tools=[WEATHER])
        assert row.input_ids[: len(ids)] == ids
        assert row.labels[len(ids)] == row.input_ids[len(ids)]

    @pytest.mark.parametrize(
        ("tools", "calls", "code"),
        [
            ([{"type": "function"}], None, "wrong_type"),
            (None, [{"function": {"name": "weather", "arguments": "3"}}], "invalid_arguments"),
        ],
    )
    def test_serving_refuses_tools_that_are_none(self, tools: Any, calls: Any, code: str) -> None:
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        with pytest.raises(InvalidInput) as caught:
            served(make_tokenizer(TOOL_TEMPLATE), messages=[TURNS[1], turn], tools=tools)
        assert caught.value.code == code

    def test_serving_refuses_tools_that_the_template_leaves_out(self) -> None:
        with pytest.raises(InvalidInput) as caught:
            served(make_tokenizer(), messages=TURNS[1:2], tools=[WEATHER])
        assert (caught.value.code, caught.value.field) == ("tools_unsupported", "tools")

    def test_what_is_said_before_a_call_is_learnt_with_it(self) -> None:
        tokenizer = make_tokenizer(TOOL_TEMPLATE)
        question, call, *rest = TOOL_ROW["messages"]
        said = {"messages": [question, call | {"content": "Let me see."}, *rest]}
        row = render_row(to_example(said, "messages"), tokenizer)
        assert trained_runs(row, tokenizer)[0].startswith("Let me see.<tool_call>weather")

    @pytest.mark.parametrize(
        ("template", "row", "field"),
        [
            (CHATML, TOOL_ROW, "tools"),
            (CHATML, {"messages": TOOL_ROW["messages"]}, "messages[1].tool_calls"),
            (
                TOOL_TEMPLATE.replace(
                    "{%- for message in messages %}",
                    "{%- for message in messages if message.role != 'tool' %}",
                ),
                TOOL_ROW,
                "messages[2].content",
            ),
            (
                "{% if messages[2] %}{{ raise_exception('roles must alternate') }}{% endif %}"
                + CHATML,
                TOOL_ROW,
                None,
            ),
        ],
    )
    def test_a_template_that_leaves_some_of_it_out_is_refused(
        self, tmp_path: Path, template: str, row: dict[str, Any], field: str | None
    ) -> None:
        tokenizer = make_tokenizer(template)
        report = examine(job(), write(tmp_path, {"messages": TURNS[1:3]}, row), tokenizer)
        assert [(e.line, e.code, e.field) for e in report.errors] == [
            (2, "tools_unsupported", field)
        ]

    def test_control_tokens_in_arguments_are_refused(self) -> None:
        row = json.loads(json.dumps(TOOL_ROW))
        function = row["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = '{"city": "<|im_end|>"}'
        with pytest.raises(InvalidInput) as caught:
            render_row(to_example(row, "messages"), make_tokenizer(TOOL_TEMPLATE))
        assert (caught.value.code, caught.value.field) == (
            "control_token_in_content",
            "messages[1].tool_calls",
        )


class TestTrainedText:
    """What is trained is read back from ids and labels."""

    @pytest.fixture
    def tokenizer(self) -> Any:
        return make_tokenizer()

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_labels_that_are_off_by_one_are_found(self, tokenizer: Any, shift: int) -> None:
        example = Example(messages=TURNS)
        row = render_row(example, tokenizer)
        TrainedTextCheck(tokenizer).check(example, row)
        trained = [label >= 0 for label in row.labels]
        moved = trained[shift:] + trained[:shift]
        labels = [i if on else -100 for i, on in zip(row.input_ids, moved, strict=True)]
        with pytest.raises(InvalidInput) as caught:
            TrainedTextCheck(tokenizer).check(example, replace(row, labels=labels))
        assert caught.value.code == "trained_text_differs"

    def test_an_answer_that_is_not_trained_is_found(self, tokenizer: Any) -> None:
        row = render_row(Example(messages=TURNS, trained=(4,)), tokenizer)
        with pytest.raises(InvalidInput) as caught:
            TrainedTextCheck(tokenizer).check(Example(messages=TURNS), row)
        assert caught.value.code == "trained_text_differs"

    def test_a_text_that_the_tokenizer_cannot_spell_is_found(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, ":": 3}, "<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="</s>", unk_token="<unk>"
        )
        rows = [{"prompt": "a:", "completion": text} for text in ("a", "b")]
        report = examine(job(), write(tmp_path, *rows), tokenizer)
        assert [(e.line, e.code) for e in report.errors] == [(2, "trained_text_differs")]
