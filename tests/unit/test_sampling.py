from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.errors import TunesmithError
from core.inference.engine import SamplingParams
from core.inference.sampling import RowSampler, keep_top_k, keep_top_p, penalise_repetition

VOCABULARY = 50


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(
    row: int = 0, prompt: tuple[int, ...] = (), eos: tuple[int, ...] = (), **params: object
):
    return RowSampler(SamplingParams(**params), row, prompt, eos)


@given(st.integers(0, 10_000), st.integers(1, VOCABULARY + 5))
def test_top_k_is_that_of_transformers(seed: int, top_k: int) -> None:
    raw = logits(seed)
    assert torch.equal(keep_top_k(raw, top_k), TopKLogitsWarper(top_k)(None, raw[None])[0])


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_top_p_is_that_of_transformers(seed: int, top_p: float) -> None:
    raw = logits(seed)
    assert torch.equal(keep_top_p(raw, top_p), TopPLogitsWarper(top_p)(None, raw[None])[0])


@given(st.integers(0, 10_000), st.sets(st.integers(0, VOCABULARY - 1)), st.floats(0.5, 3))
def test_repetition_penalty_is_that_of_transformers(
    seed: int, seen: set[int], penalty: float
) -> None:
    raw = logits(seed)
    ids = torch.tensor(sorted(seen), dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids[None], raw[None].clone())[0]
    assert torch.equal(penalise_repetition(raw, ids, penalty), expected)


def test_temperature_zero_takes_the_best_and_a_tiny_one_too() -> None:
    raw = logits(1)
    for temperature in (0.0, 1e-320, 1e-9, 1e-5):
        assert sampler(temperature=temperature).choose(raw).token_id == int(raw.argmax())


def test_the_repetition_penalty_counts_prompt_and_answer() -> None:
    raw = torch.zeros(VOCABULARY)
    raw[7], raw[8], raw[9] = 3.0, 2.5, 2.0
    row = sampler(prompt=(7,), repetition_penalty=2.0)
    assert [row.choose(raw).token_id for _ in range(2)] == [8, 9]


def test_end_tokens_wait_for_the_minimum_length() -> None:
    raw = torch.zeros(VOCABULARY)
    raw[3], raw[4], raw[5] = 9.0, 8.0, 7.0
    row = sampler(eos=(3, 4), min_new_tokens=2)
    assert [row.choose(raw).token_id for _ in range(3)] == [5, 5, 3]


def test_a_row_draws_what_the_next_seed_draws() -> None:
    raw = logits(2)

    def drawn(row: int, seed: int) -> list[int]:
        chooser = sampler(row, temperature=1.0, seed=seed)
        return [chooser.choose(raw).token_id for _ in range(20)]

    assert drawn(2, 40) == drawn(0, 42) == drawn(0, 42)
    assert drawn(0, 40) != drawn(0, 42)
    assert drawn(15, 2**63 - 1)


def test_without_a_seed_no_two_rows_are_alike() -> None:
    rows = [sampler(temperature=5.0), sampler(temperature=5.0)]
    raw = logits(3)
    first, second = ([row.choose(raw).token_id for _ in range(40)] for row in rows)
    assert first != second


def test_log_probabilities_are_of_the_raw_logits() -> None:
    raw = logits(4)
    given_logits = raw.clone()
    choice = sampler(
        prompt=(1, 2), temperature=0.3, top_k=2, repetition_penalty=1.9, seed=1, logprobs=4
    ).choose(raw)
    expected = torch.log_softmax(given_logits, dim=-1)
    assert choice.logprob == pytest.approx(float(expected[choice.token_id]))
    assert [token_id for token_id, _ in choice.top] == torch.topk(expected, 4).indices.tolist()
    assert torch.equal(raw, given_logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_an_error(bad: float) -> None:
    raw = logits(5)
    raw[10] = bad
    with pytest.raises(TunesmithError) as failed:
        sampler().choose(raw)
    assert failed.value.code == "logits_not_finite"
