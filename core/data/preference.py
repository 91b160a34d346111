"""Rows of preference pairs: a prompt, the answer that was chosen and the one that was rejected.

Three spellings: a prompt and two answers as texts; the same as lists of turns; or two whole
conversations that differ in their last turn only, whose common turns are the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from core.data.rows import Problem
from core.data.turns import CHAT, check_order, check_text, check_turns, check_weights, plain_turns

ANSWERS = ("chosen", "rejected")


def check_preference(row: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with a row that has both answers."""
    prompt = row.get("prompt")
    kinds = {name: type(row[name]) for name in ANSWERS}
    if set(kinds.values()) == {str}:
        yield from _check_texts(prompt, row)
    elif set(kinds.values()) == {list}:
        yield from list(_check_turns(prompt, row)) or _check_same_prompt(prompt, row)
    else:
        odd = "chosen" if kinds["chosen"] not in (str, list) else "rejected"
        yield Problem(
            "wrong_type", "'chosen' and 'rejected' must be two texts or two lists of turns", odd
        )


def preference_turns(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], ...]:
    """Return the conversations that end in the chosen and in the rejected answer.

    Args:
        row: In turns, and free of problems.
    """
    prompt = row.get("prompt")
    before = prompt if isinstance(prompt, list) else []
    return tuple(plain_turns([*before, *row[name]], CHAT) for name in ANSWERS)


def _check_texts(prompt: Any, row: Mapping[str, Any]) -> Iterator[Problem]:
    if prompt is None:
        yield Problem("missing_field", "answers that are texts need the field 'prompt'", "prompt")
        return
    if isinstance(prompt, list):
        yield Problem(
            "wrong_type", "the prompt is a list of turns, so the answers must be, too", "chosen"
        )
        return
    problems = [
        *check_text(prompt, "prompt"),
        *(problem for name in ANSWERS for problem in check_text(row[name], name)),
    ]
    yield from problems
    if not problems and row["chosen"] == row["rejected"]:
        yield _same_answer()


def _check_turns(prompt: Any, row: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that each answer ends a conversation in the right order."""
    before = prompt if isinstance(prompt, list) else []
    problems = list(check_turns(before, "prompt", CHAT))
    for name in ANSWERS:
        if not row[name]:
            problems.append(Problem("empty", f"{name!r} has no turns", name))
        problems += check_turns(row[name], name, CHAT)
    yield from problems
    if problems:
        return
    for name in ANSWERS:
        turns = [*before, *row[name]]
        where = [f"prompt[{index}]" for index in range(len(before))]
        where += [f"{name}[{index}]" for index in range(len(row[name]))]
        order = list(check_order(turns, where, CHAT))
        # What is wrong with the prompt is said once.
        if name == "chosen" or [p.field for p in order if p.field not in where[: len(before)]]:
            yield from order
        if not order:
            yield from check_weights(row[name][-1:], name, CHAT)


def _check_same_prompt(prompt: Any, row: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that the conversations differ in their last turn and in nothing else."""
    chosen, rejected = preference_turns(row)
    if chosen[:-1] != rejected[:-1]:
        yield Problem(
            "prompts_differ",
            "'chosen' and 'rejected' must be the same conversation up to their last turn",
            "rejected",
        )
    elif isinstance(prompt, str) and prompt not in [turn["content"] for turn in chosen[:-1]]:
        # Some data sets repeat the question as a text beside the whole conversations.
        yield Problem("prompts_differ", "the prompt is none of the conversation's turns", "prompt")
    elif prompt is not None and not isinstance(prompt, str | list):
        yield Problem("wrong_type", "the prompt must be a text or a list of turns", "prompt")
    elif chosen == rejected:
        yield _same_answer()


def _same_answer() -> Problem:
    return Problem("same_answer", "the chosen answer equals the rejected one", "rejected")
