"""From logits to a token: each step against its reference, and rows that ignore neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.errors import TunesmithError
from core.inference.drawing import Cuts, draw_tokens, find_candidates
from core.inference.engine import SamplingParams
from core.inference.generation import TokenChoice
from core.inference.ranking import in_blocks
from core.inference.sampling import RowSampler, choose_tokens
from core.inference.shaping import SeenTokens, penalise_presence, penalise_repetition

VOCABULARY = 50


def logits(seed: int, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(
    row: int = 0, prompt: tuple[int, ...] = (), ends: tuple[int, ...] = (), **params: Any
) -> RowSampler:
    return RowSampler(SamplingParams(**params), row, prompt, ends)


def choose(chooser: RowSampler, raw: torch.Tensor) -> TokenChoice:
    [choice] = choose_tokens(raw[None], [chooser])
    if isinstance(choice, TunesmithError):
        raise choice
    return choice


def ids_of(choices: list[TokenChoice | TunesmithError]) -> list[int]:
    return [choice.token_id for choice in choices if isinstance(choice, TokenChoice)]


def choose_ids(chooser: RowSampler, raw: torch.Tensor, count: int) -> list[int]:
    return [choose(chooser, raw).token_id for _ in range(count)]


def may_be_drawn(raw: torch.Tensor, **params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that may be drawn from one row, and their weights."""
    cuts = Cuts.of([SamplingParams(**params)], raw.numel())
    [(_, found)] = find_candidates(in_blocks(raw[None].numpy()), cuts)
    weights = torch.from_numpy(found.weights[0])
    order = torch.sort(raw, descending=True, stable=True).indices
    count = min(raw.numel(), weights.numel())
    assert bool((weights[count:] == 0).all())
    kept = weights[:count] > 0
    return order[:count][kept], weights[:count][kept]


def draw(raw: torch.Tensor, point: float, **params: Any) -> int:
    cuts = Cuts.of([SamplingParams(**params)], raw.numel())
    return int(draw_tokens(in_blocks(raw[None].numpy()), cuts, np.array([point]))[0])


# The distribution.


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 2, 50, 128, 129, 1000, 5000]),
    spread=st.sampled_from([0.01, 1.0, 5.0]),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 300, 6000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.001]),
    min_p=st.sampled_from([0.0, 1e-3, 0.1, 0.9, 1.0]),
    ruled_out=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_what_may_be_drawn_is_what_transformers_leaves(
    seed: int,
    size: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    ruled_out: float,
) -> None:
    raw = logits(seed, size) * spread
    others = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < ruled_out
    others[raw.argmax()] = False
    raw = raw.masked_fill(others, float("-inf"))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    # In float64, since transformers' own sums in float32 move the edge of a wide nucleus.
    expected = warpers(None, raw[None].double())[0].softmax(dim=-1)

    ids, found = may_be_drawn(raw, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights = torch.zeros(size, dtype=torch.float64).index_add(0, ids, found)
    probabilities = weights / weights.sum()
    assert len(set(ids.tolist())) == ids.numel()
    differing = ((probabilities > 0) != (expected > 0)).nonzero().flatten().tolist()
    assert len(differing) <= 1, "more than the token on the edge of the nucleus"
    for token_id in differing:
        nucleus = expected.masked_fill(raw < raw[token_id], 0).sum()
        assert min_p or top_p < 1, nucleus
        assert _is_on_the_edge(raw, token_id, temperature, top_k, top_p, min_p)
    if not differing:
        assert torch.allclose(probabilities, expected, atol=1e-6)


def _is_on_the_edge(
    raw: torch.Tensor, token_id: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> bool:
    """Whether rounding alone decides if the token stays."""
    kept = raw.double() / temperature
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept[None])[0]
    probabilities = kept.softmax(dim=-1)
    own = float(probabilities[token_id])
    before = probabilities[raw > raw[token_id]].sum()
    return bool(
        abs(before - top_p) < 1e-6
        or abs(own / probabilities.max() - min_p) < 1e-6 * max(min_p, own)
    )


def test_ties_with_the_last_of_the_best_stay() -> None:
    raw = torch.zeros(400)
    raw[7] = 1.0
    assert may_be_drawn(raw, temperature=1.0, top_k=5)[0].numel() == 400
    assert may_be_drawn(raw, temperature=1.0, top_k=1)[0].tolist() == [7]


def test_of_equal_tokens_the_nucleus_has_as_many_as_it_needs() -> None:
    raw = torch.zeros(1000)
    assert may_be_drawn(raw, temperature=1.0, top_p=0.5)[0].tolist() == list(range(500))
    drawn = {draw(raw, point / 100, temperature=1.0, top_p=0.5) for point in range(100)}
    assert drawn == set(range(0, 500, 5))
    wide = torch.zeros(49_152)
    assert may_be_drawn(wide, temperature=1.0, top_p=0.001)[0].tolist() == list(range(50))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("size", [5, 128, 300])
def test_points_are_spread_over_the_tokens_by_their_probability(
    temperature: float, size: int
) -> None:
    raw = logits(3, size)
    raw[1] = float("-inf")
    probabilities = (raw.double() / temperature).softmax(dim=-1)
    points = [(i + 0.5) / 4000 for i in range(4000)]
    # All points at once: each one is a row of the same logits.
    rows = in_blocks(raw.expand(4000, size).numpy())
    for top_p in (1.0, 0.999999):
        cuts = Cuts.of([SamplingParams(temperature=temperature, top_p=top_p)] * 4000, size)
        drawn = draw_tokens(rows, cuts, np.array(points))
        counts = torch.bincount(torch.from_numpy(drawn), minlength=size)
        assert float((counts / 4000 - probabilities).abs().max()) < 2 / 4000
    assert draw(raw, math.nextafter(1, 0), temperature=temperature) != 1


def test_temperature_zero_takes_the_best_and_a_tiny_one_too() -> None:
    raw = logits(1)
    for temperature in (0.0, 1e-320, 1e-9, 1e-5):
        assert choose(sampler(temperature=temperature), raw).token_id == int(raw.argmax())


# Penalties, bias and limits.


@given(st.integers(0, 10_000), st.sets(st.integers(0, VOCABULARY - 1)), st.floats(0.5, 3))
def test_repetition_penalty_is_that_of_transformers(
    seed: int, seen: set[int], penalty: float
) -> None:
    raw = logits(seed)
    ids = torch.tensor(sorted(seen), dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids[None], raw[None].clone())[0]
    shaped = torch.stack([raw, raw, raw])
    rows = np.ones(len(ids), np.int64)
    penalties = np.full(len(ids), penalty, np.float32)
    penalise_repetition(shaped.numpy(), rows, ids.numpy(), penalties)
    assert torch.equal(shaped, torch.stack([raw, expected, raw]))


def test_the_repetition_penalty_counts_prompt_and_answer() -> None:
    raw = torch.zeros(VOCABULARY)
    raw[7], raw[8], raw[9] = 3.0, 2.5, 2.0
    assert choose_ids(sampler(prompt=(7,), repetition_penalty=2.0), raw, 2) == [8, 9]


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=12), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_are_taken_off_as_openai_documents(
    answer: list[int], presence: float, frequency: float
) -> None:
    raw = logits(6)
    seen = SeenTokens([3, 3, 7])
    for token_id in answer:
        seen.add(token_id)
    expected = [
        logit - answer.count(token_id) * frequency - (presence if token_id in answer else 0)
        for token_id, logit in enumerate(raw.tolist())
    ]
    shaped = torch.stack([raw, raw])
    rows = np.ones(len(seen.ids), np.int64)
    taken = [np.full(len(rows), value, np.float32) for value in (presence, frequency)]
    penalise_presence(shaped.numpy(), rows, seen.ids, seen.counts, *taken)
    assert shaped[1].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(shaped[0], raw)


@given(st.lists(st.integers(0, 300), max_size=20), st.lists(st.integers(0, 300), max_size=400))
def test_what_was_seen_is_counted_once_each(prompt: list[int], answer: list[int]) -> None:
    seen = SeenTokens(prompt)
    for token_id in answer:
        seen.add(token_id)
    counted = dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True))
    assert counted == {token_id: answer.count(token_id) for token_id in {*prompt, *answer}}
    assert len(counted) == len(seen.ids)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    raw = torch.zeros(VOCABULARY)
    raw[7], raw[8] = 3.0, 1.5
    assert choose_ids(sampler(prompt=(7, 7), presence_penalty=2.0), raw, 4) == [7, 8, 7, 7]
    # 3.0 falls by one each time: 2.0 is better than 1.5, 1.0 is not, then 0.5 against 1.0.
    assert choose_ids(sampler(prompt=(7, 7), frequency_penalty=1.0), raw, 4) == [7, 7, 8, 7]


def test_a_bias_is_added_after_the_penalties() -> None:
    raw = logits(8)
    best, second = torch.topk(raw, 2).indices.tolist()
    assert choose_ids(sampler(logit_bias={best: -100}), raw, 2) == [second, second]
    worst = int(raw.argmin())
    penalised = sampler(prompt=(worst,), repetition_penalty=5.0, logit_bias={worst: 100})
    assert choose_ids(penalised, raw, 3) == [worst] * 3


def test_end_tokens_wait_for_the_minimum_length() -> None:
    raw = torch.zeros(VOCABULARY)
    raw[3], raw[4], raw[5] = 9.0, 8.0, 7.0
    assert choose_ids(sampler(ends=(3, 4), min_new_tokens=2), raw, 3) == [5, 5, 3]


def test_end_tokens_wait_in_a_batch_too() -> None:
    end_is_best, other_is_best = torch.zeros(2, VOCABULARY)
    end_is_best[3], end_is_best[5] = 9.0, 7.0
    other_is_best[6], other_is_best[3] = 9.0, 7.0
    raw = torch.stack([end_is_best, other_is_best, end_is_best])
    rows = [sampler(ends=(3,), min_new_tokens=minimum) for minimum in (2, 2, 1)]
    steps = [ids_of(choose_tokens(raw, rows)) for _ in range(3)]
    assert steps == [[5, 6, 5], [5, 6, 3], [3, 6, 3]]


# Seeds and neighbours.


def test_a_row_draws_what_the_next_seed_draws() -> None:
    raw = logits(2)

    def drawn(row: int, seed: int) -> list[int]:
        return choose_ids(sampler(row, temperature=1.0, seed=seed), raw, 20)

    assert drawn(2, 40) == drawn(0, 42) == drawn(0, 42)
    assert drawn(0, 40) != drawn(0, 42)
    assert drawn(15, 2**63 - 1)


def test_without_a_seed_no_two_rows_are_alike() -> None:
    raw = logits(3)
    first, second = (choose_ids(sampler(temperature=5.0), raw, 40) for _ in range(2))
    assert first != second


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 3},
    {"temperature": 1.5, "top_p": 0.95},
    {"temperature": 0.7, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.9, "logprobs": 2, "frequency_penalty": 0.7},
    {"temperature": 3.0, "min_new_tokens": 4, "top_k": 700},
    {"logit_bias": {5: 40.0}},
    {"logprobs": 5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.001, "logprobs": 0},
    {"temperature": 5.0, "top_p": 0.99},
    {"temperature": 0.01, "top_p": 0.5, "top_k": 100_000},
]


@given(
    kinds=st.lists(st.integers(0, len(MIXED) - 1), min_size=1, max_size=16),
    seed=st.integers(0, 1000),
    size=st.sampled_from([300, 2048, 3001]),
    spread=st.sampled_from([0.01, 1.0, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_alone_and_in_any_batch(
    kinds: list[int], seed: int, size: int, spread: float
) -> None:
    def samplers() -> list[RowSampler]:
        return [
            sampler(row, prompt=(1, 2), ends=(9,), seed=seed, **MIXED[kind])
            for row, kind in enumerate(kinds)
        ]

    together, alone, turned = samplers(), samplers(), samplers()[::-1]
    for step in range(4):
        raw = torch.stack([logits(seed + 31 * row + step, size) for row in range(len(kinds))])
        raw *= spread
        given_logits = raw.clone()
        in_batch = choose_tokens(raw, together)
        assert torch.equal(raw, given_logits)
        assert choose_tokens(raw.flip(0), turned)[::-1] == in_batch
        for row, one in enumerate(alone):
            assert in_batch[row] == choose_tokens(raw[row : row + 1].clone(), [one])[0]


def test_a_draw_takes_one_number_of_the_row_and_nothing_else_does() -> None:
    greedy = sampler(seed=5, repetition_penalty=1.2, logprobs=2)
    drawing = [sampler(seed=5, temperature=1.0), sampler(seed=5, temperature=1.0, top_p=0.9)]
    broken = sampler(seed=5, temperature=1.0)
    raw = torch.stack([logits(1), logits(2), logits(3), logits(4)])
    raw[3, 7] = float("inf")
    choose_tokens(raw, [greedy, *drawing, broken])
    numbers = torch.Generator().manual_seed(5)
    first, second = (float(torch.rand((), generator=numbers, dtype=torch.float64)) for _ in "12")
    assert [each.uniform() for each in (greedy, *drawing, broken)] == [first, second, second, first]


def test_a_row_that_is_no_number_fails_alone() -> None:
    raw = torch.stack([logits(1), logits(2), logits(3)])
    raw[1, 4] = float("nan")
    rows = [sampler(), sampler(temperature=1.0, top_k=5), sampler(temperature=1.0, top_k=5)]
    before, failed, after = choose_tokens(raw, rows)
    assert isinstance(before, TokenChoice)
    assert isinstance(after, TokenChoice)
    assert isinstance(failed, TunesmithError)
    assert failed.code == "logits_not_finite"


# What is reported.


def test_log_probabilities_are_of_the_raw_logits() -> None:
    raw = logits(4)
    given_logits = raw.clone()
    chooser = sampler(
        prompt=(1, 2), temperature=0.3, top_k=2, repetition_penalty=1.9, seed=1, logprobs=4,
        logit_bias={3: 5.0},
    )  # fmt: skip
    choice = choose(chooser, raw)
    expected = torch.log_softmax(given_logits, dim=-1)
    assert choice.logprob == pytest.approx(float(expected[choice.token_id]))
    assert [token_id for token_id, _ in choice.top] == torch.topk(expected, 4).indices.tolist()
    assert torch.equal(raw, given_logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_an_error(bad: float) -> None:
    raw = logits(5)
    raw[10] = bad
    with pytest.raises(TunesmithError) as failed:
        choose(sampler(), raw)
    assert failed.value.code == "logits_not_finite"


def test_each_row_of_a_batch_reports_as_much_as_it_asked_for() -> None:
    raw = torch.stack([logits(seed, 300) for seed in range(4)])
    raw[3] = 0.0
    rows = [sampler(logprobs=3), sampler(), sampler(logprobs=0), sampler(logprobs=4)]
    choices = choose_tokens(raw, rows)
    expected = torch.log_softmax(raw, dim=-1)
    tops = []
    for row, choice in enumerate(choices):
        assert isinstance(choice, TokenChoice)
        tops.append([token_id for token_id, _ in choice.top])
        for token_id, logprob in choice.top:
            assert logprob == pytest.approx(float(expected[row, token_id]))
    assert tops == [torch.topk(raw[0], 3).indices.tolist(), [], [], [0, 1, 2, 3]]
    assert [choice.logprob is None for choice in choices] == [False, True, False, False]  # type: ignore[union-attr]


def test_what_ends_only_because_nothing_else_is_possible_ends() -> None:
    raw = torch.full((VOCABULARY,), float("-inf"))
    raw[3] = 1.0
    assert choose_ids(sampler(ends=(3,), min_new_tokens=9), raw, 2) == [3, 3]
    assert choose_ids(sampler(ends=(3,), min_new_tokens=9, temperature=1.0), raw, 2) == [3, 3]
