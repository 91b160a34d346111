from __future__ import annotations

import random

import numpy as np
import pytest

from core.training.scores import bootstrap_mean, exact_match, rouge_l


def common_length(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence, by the table of the text books."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, ours in enumerate(first):
        for j, theirs in enumerate(second):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if ours == theirs else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    draw = random.Random(3)
    for _ in range(300):
        first = [draw.choice("abcd") for _ in range(draw.randint(1, 40))]
        second = [draw.choice("abcde") for _ in range(draw.randint(1, 40))]
        expected = 2 * common_length(first, second) / (len(first) + len(second))
        assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "the CAT, sat", 1.0),
        ("", "the cat", 0.0),
        ("Привет, мир", "привет мир", 1.0),
        ("مرحبا بالعالم", "مرحبا", 2 / 3),
        ("北京是首都", "首都是北京", 0.4),
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),
        ("cafe\u0301", "café", 1.0),
        ("🙂", "🙂", 1.0),
        ("🙂", "🙃", 0.0),
    ],
)
def test_rouge_l_reads_every_script(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_an_exact_match_forgives_blanks_and_nothing_else() -> None:
    assert exact_match(" a\n b ", "a b")
    assert exact_match("cafe\u0301", "café")
    assert not exact_match("A b", "a b")
    assert not exact_match("a b.", "a b")


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        counts = draws.integers(5, 50, size=60).astype(float)
        interval = bootstrap_mean(counts * draws.normal(-0.2, 1, size=60), counts, seed=0)
        covered += interval.low <= -0.2 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_is_the_same_for_the_same_seed_and_exact_for_equal_rows() -> None:
    totals, counts = np.array([3.0, 1.0, 2.0]), np.array([2.0, 2.0, 1.0])
    assert bootstrap_mean(totals, counts, seed=5) == bootstrap_mean(totals, counts, seed=5)
    assert bootstrap_mean(totals, counts, seed=5).mean == pytest.approx(6 / 5)
    same = bootstrap_mean(np.full(9, -1.5), np.full(9, 3.0), seed=0)
    assert (same.mean, same.low, same.high) == (-0.5, -0.5, -0.5)
