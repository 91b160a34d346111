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
    tokens = learned(step=step, token=token).tokens(others_wait=True)
    assert 0.5 * step < tokens * token <= step


def test_without_answers_a_pass_ends_soon_enough_for_whoever_comes() -> None:
    slow = learned(step=0.02, token=0.002).tokens(others_wait=False)
    fast = learned(step=0.02, token=0.000_01).tokens(others_wait=False)
    assert 0.1 < slow * 0.002 < 0.5
    assert fast > 2 * slow


def test_short_rests_of_prompts_say_little_about_the_cost_of_a_token() -> None:
    pace = learned(step=0.02, token=0.001)
    before = pace.tokens(others_wait=False)
    for _ in range(10):
        # What the prefix store left of a prompt: the pass costs a step, however few tokens it has.
        pace.note_pass(0.021, answers=0, prompt_tokens=1)
    assert pace.tokens(others_wait=False) > before / 2


def test_what_is_far_behind_in_a_long_prompt_costs_more_and_is_read_in_smaller_pieces() -> None:
    step, token = 0.02, 0.001
    pace = learned(step=step, token=token)
    for place in range(60):
        tokens = pace.tokens(others_wait=True)
        # A token costs up to twice as much there.
        cost = tokens * token * (1 + place / 60)
        assert step + cost < 2.2 * step
        pace.note_pass(step + cost, answers=4, prompt_tokens=tokens)
    assert cost > 0.7 * step


def test_before_anything_is_known_a_piece_is_small_beside_answers() -> None:
    pace = PrefillPace()
    assert pace.tokens(others_wait=True) < pace.tokens(others_wait=False)
