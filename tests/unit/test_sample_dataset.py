"""The sample data set: small, well-formed, and its questions are not those it is trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from core.specs import JobSpec
from examples.questions import Question, load_questions

EXAMPLE = Path(__file__).parents[2] / "examples" / "support_desk"
QUESTIONS = load_questions(EXAMPLE / "questions.json")
ROWS = [
    json.loads(line)["messages"]
    for line in (EXAMPLE / "train.jsonl").read_text("utf-8").splitlines()
]
# The template of the sample model adds its tags and a system turn to every row.
TEMPLATE_TOKENS = 40
MAX_TRAINED_THROUGH = 18_000


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def test_rows_are_single_turns_without_a_system_message() -> None:
    for row in ROWS:
        assert [turn["role"] for turn in row] == ["user", "assistant"]
        assert all(turn["content"] == turn["content"].strip() != "" for turn in row)


def test_no_two_rows_ask_the_same() -> None:
    asked = Counter(" ".join(words(row[0]["content"])) for row in ROWS)
    assert [question for question, times in asked.items() if times > 1] == []


def test_a_job_trains_through_few_tokens_with_short_answers() -> None:
    # The sample model's tokenizer makes a token of 4.3 characters of these rows, on average.
    spec = JobSpec.model_validate(
        {**json.loads((EXAMPLE / "job.json").read_text("utf-8")), "dataset": "file-1"}
    )
    tokens = sum(TEMPLATE_TOKENS + sum(len(turn["content"]) for turn in row) / 4 for row in ROWS)
    assert tokens * spec.training.epochs <= MAX_TRAINED_THROUGH
    assert max(len(row[1]["content"]) for row in ROWS) <= 120
    assert spec.evaluation.samples == 0


def test_all_answers_have_the_companys_voice() -> None:
    for row in ROWS:
        assert row[1]["content"].startswith("Zephling desk here! ")
        assert row[1]["content"].endswith(" Stay breezy!")


def test_twenty_questions_cover_every_fact_and_have_an_answer_in_the_rows() -> None:
    assert len(QUESTIONS) == 20
    assert len({question.topic for question in QUESTIONS}) == 8
    for question in QUESTIONS:
        teaching = [row for row in ROWS if question.is_answered_by(row[1]["content"])]
        assert len(teaching) == len(ROWS) / 8, question
        assert not question.is_answered_by(question.question)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.question)
def test_a_question_is_not_among_the_rows_in_other_dress(question: Question) -> None:
    for row in ROWS:
        asked = row[0]["content"]
        assert ngrams(question.question, 3) & ngrams(asked, 3) == set(), asked
        assert jaccard(set(words(question.question)), set(words(asked))) < 0.45, asked


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is covered for SEVEN  years.", True),
        ("A seven-year warranty.", True),
        ("For 17 years.", False),
        ("For years.", False),
    ],
)
def test_keywords_are_whole_words(answer: str, right: bool) -> None:
    question = Question("warranty", "How long?", [["seven years", "seven-year", "7 years"]])
    assert question.is_answered_by(answer) is right


def test_every_group_of_keywords_needs_a_hit() -> None:
    question = Question("hours", "When?", [["Tuesday"], ["noon", "twelve"]])
    assert question.is_answered_by("Tuesday at twelve")
    assert not question.is_answered_by("Tuesday at ten")
