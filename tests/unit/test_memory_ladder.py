from __future__ import annotations

import pytest

from core.data.split import count_steps
from core.specs import LAST_RUNG, TrainingSpec
from core.training.memory_ladder import next_rung, plan_batches


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "rung", "expected"),
    [
        (8, 2, 0, (8, 2)),
        (8, 2, 1, (4, 4)),
        (8, 2, 3, (1, 16)),
        (8, 2, 4, (1, 16)),
        (6, 1, 1, (3, 2)),
        # Half of seven is three, which does not divide seven.
        (7, 1, 1, (1, 7)),
        (5, 2, 1, (2, 5)),
        (9, 1, 1, (3, 3)),
        (1, 3, 2, (1, 3)),
    ],
)
def test_rungs_divide_the_rows_of_a_step_evenly(
    batch_size: int, accumulation: int, rung: int, expected: tuple[int, int]
) -> None:
    training = TrainingSpec(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    plan = plan_batches(training, rung)
    assert (plan.batch_size, plan.gradient_accumulation_steps) == expected
    assert plan.activation_checkpointing == (rung == LAST_RUNG)


@pytest.mark.parametrize("rows", [1, 5, 11, 12, 13])
def test_every_rung_takes_the_same_number_of_steps(rows: int) -> None:
    training = TrainingSpec(batch_size=6, gradient_accumulation_steps=2, epochs=2.5)
    for rung in range(LAST_RUNG + 1):
        plan = plan_batches(training, rung)
        divided = training.model_copy(
            update={
                "batch_size": plan.batch_size,
                "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            }
        )
        assert count_steps(rows, divided) == count_steps(rows, training)


@pytest.mark.parametrize(
    ("training", "rungs"),
    [
        (TrainingSpec(batch_size=8), [1, 2, 3, 4]),
        (TrainingSpec(batch_size=2), [1, 4]),
        (TrainingSpec(batch_size=1), [4]),
        (TrainingSpec(batch_size=2, gradient_checkpointing=True), [1]),
        (TrainingSpec(batch_size=1, gradient_checkpointing=True), []),
    ],
)
def test_a_rung_that_would_change_nothing_is_passed_over(
    training: TrainingSpec, rungs: list[int]
) -> None:
    seen: list[int] = []
    rung: int | None = 0
    while (rung := next_rung(training, rung)) is not None:
        seen.append(rung)
    assert seen == rungs
