"""A few faults at the instants where most is at stake; `make chaos` does them all, many times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.driver import Driver
from tests.chaos.schedule import HELD, MATRIX, PAIRS, SUBMIT, Injection, plan

FAULTS = (
    ("flush Redis", "job.claimed"),
    ("kill worker", "publish.commit"),
    ("stop worker past its lease", "publish.alias"),
    ("kill Postgres", "events.flush"),
    ("kill API", SUBMIT),
    ("fill disk", "checkpoint.upload"),
)


@pytest.mark.long
def test_faults_at_named_instants_lose_no_job_and_publish_nothing_twice(tmp_path: Path) -> None:
    schedule = [
        Injection(number, instant, fault, occurrence=1, fraction=0.4)
        for number, (fault, instant) in enumerate(FAULTS, 1)
    ]
    said: list[str] = []
    driver = Driver(tmp_path, schedule, seed=1, base_models=1, in_flight=3, say=said.append)
    outcome = driver.run()
    assert outcome.violations == [], "\n".join(said)
    assert outcome.unreached == []
    done = [(recovery.injection.fault, recovery.injection.instant) for recovery in outcome.done]
    assert sorted(done) == sorted(FAULTS)
    assert set(outcome.jobs) == {"succeeded"}


def test_the_seed_alone_decides_the_schedule() -> None:
    assert plan(7, 50) == plan(7, 50)
    assert plan(7, 50) != plan(8, 50)
    assert plan(7, 20) == plan(7, 50)[:20]


def test_a_long_schedule_has_each_pair_three_times() -> None:
    schedule = plan(1, 3 * len(PAIRS))
    done = [(injection.instant, injection.fault) for injection in schedule]
    assert {pair: done.count(pair) for pair in PAIRS} == dict.fromkeys(PAIRS, 3)
    assert len(schedule) >= 200


def test_every_instant_of_the_service_meets_most_faults() -> None:
    for instant in HELD:
        assert sum(instant in instants for instants in MATRIX.values()) >= 8, instant
