"""How much of prompts a pass reads."""

from __future__ import annotations

from core.inference.prefill_pace import PrefillPace


def learned(*, step: float, token: float) -> PrefillPace:
    pace = PrefillPace()
    for _ in range(50):
        pace.note_pass(step, answers=4, prompt_tokens=0)
        pace.note_pass(step + 100 * token, answers=4, prompt_tokens=100)
    return pace


def test_answers_that_grow_wait_for_two_usual_steps_at_most() -> None:
    step, token = 0.02, 0.001
    tokens = learned(step=step, token=token).tokens(answers=4, prompts=1)
    assert 0.5 * step < tokens * token <= step


def test_answers_let_more_than_one_prompt_by_when_more_of_them_wait() -> None:
    step, token = 0.01, 0.0001
    pace = learned(step=step, token=token)
    alone = pace.tokens(answers=1, prompts=1)
    assert pace.tokens(answers=8, prompts=8) == alone
    assert pace.tokens(answers=8, prompts=1) == alone
    assert 3.9 * alone < pace.tokens(answers=2, prompts=8) < 4.1 * alone


def test_no_crowd_of_prompts_holds_up_an_answer_for_long() -> None:
    token = 0.001
    assert learned(step=0.02, token=token).tokens(answers=1, prompts=100) * token < 0.15
    slow = learned(step=1, token=0.05)
    assert slow.tokens(answers=1, prompts=100) == slow.tokens(answers=1, prompts=1)


def test_without_answers_a_pass_ends_soon_enough_for_whoever_comes() -> None:
    slow = learned(step=0.02, token=0.002).tokens(answers=0, prompts=1)
    fast = learned(step=0.02, token=0.000_01).tokens(answers=0, prompts=1)
    assert 0.1 < slow * 0.002 < 0.5
    assert fast > 2 * slow


def test_short_rests_of_prompts_say_little_about_the_cost_of_a_token() -> None:
    pace = learned(step=0.02, token=0.001)
    before = pace.tokens(answers=0, prompts=1)
    for _ in range(10):
        # What the prefix store left of a prompt: the pass costs a step, however few tokens it has.
        pace.note_pass(0.021, answers=0, prompt_tokens=1)
    assert pace.tokens(answers=0, prompts=1) > before / 2


def test_what_is_far_behind_in_a_long_prompt_costs_more_and_is_read_in_smaller_pieces() -> None:
    step, token = 0.02, 0.001
    pace = learned(step=step, token=token)
    for place in range(60):
        tokens = pace.tokens(answers=4, prompts=1)
        # A token costs up to twice as much there.
        cost = tokens * token * (1 + place / 60)
        assert step + cost < 2.2 * step
        pace.note_pass(step + cost, answers=4, prompt_tokens=tokens)
    assert cost > 0.7 * step


def test_before_anything_is_known_a_piece_is_small_beside_answers() -> None:
    pace = PrefillPace()
    assert pace.tokens(answers=4, prompts=1) < pace.tokens(answers=0, prompts=1)
