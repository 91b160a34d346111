"""The verdict of a chaos run notices what it is there for: each harm to a sound world is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from core import jobs
from core.config import Settings
from core.db.models import AdapterAlias, AdapterVersion, IdempotencyKey, Job, JobEvent, JobMetric
from core.db.session import Database
from core.storage import LocalStore
from tests.chaos import verdict
from tests.chaos.load import Accepted
from tests.chaos.verdict import Evidence
from tests.support import factories

STEPS = 3


@pytest.fixture
def evidence(
    sqlite_database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> Evidence:
    """One job, submitted under a key, trained and published."""
    factories.add_base_model(sqlite_database)
    job = factories.submit(
        sqlite_database, store, settings, key="k", adapter="a", training={"max_steps": STEPS}
    )
    jobs.validated(sqlite_database, factories.must_claim(sqlite_database, "w", "validate"), "w", {})
    claim = factories.must_claim(sqlite_database, "w")
    steps = [jobs.MetricUpdate(step=step, loss=1.0) for step in range(1, STEPS + 1)]
    jobs.record(sqlite_database, claim, "w", steps)
    published = factories.publish_artifact(store, tmp_path / "artifact")
    jobs.succeed(
        sqlite_database,
        claim,
        "w",
        manifest=published.manifest,
        bytes=published.bytes,
        report={},
        provenance={},
        store=store,
    )
    return Evidence(
        cluster=cast(Any, None),  # what asks the processes is not asked here
        settings=settings.model_copy(update={"artifact_url": f"file://{settings.root}"}),
        database=sqlite_database,
        accepted=[Accepted("k", job.id, {})],
        retried={},
        directory=tmp_path / "reference",
    )


def find(evidence: Evidence, store: LocalStore) -> list[str]:
    """Return all violations that database and store show."""
    with evidence.database.session() as session:
        found = find_in(evidence, session, store)
    return found + list(verdict.store_has_what_is_referenced(evidence, store))


def find_in(evidence: Evidence, session: Session, store: LocalStore) -> list[str]:
    """Return the violations that the rows of a session show."""
    return [
        violation for check in verdict.ROW_CHECKS for violation in check(evidence, session, store)
    ]


def test_a_sound_world_is_found_sound(evidence: Evidence, store: LocalStore) -> None:
    assert find(evidence, store) == []


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        (update(Job).values(status="running"), "is running"),
        (update(Job).values(status="failed"), "has not the versions []"),
        (update(Job).values(worker_id="w"), "still held by w"),
        (delete(IdempotencyKey), "differ from what was accepted"),
        (update(AdapterVersion).values(job_id="another"), "has not the versions"),
        (update(AdapterVersion).values(version=2), "has the versions [2]"),
        (update(AdapterAlias).values(version_id="another"), "not at the newest version"),
        (delete(JobEvent).where(JobEvent.sequence == 2), "has the events [1, 3"),
        (delete(JobEvent).where(JobEvent.type == "succeeded"), "has 0 events that tell of its end"),
        (delete(JobMetric).where(JobMetric.step == 2), "lacks the steps [2]"),
        (update(JobMetric).values(loss=None), "has no loss at step 1"),
    ],
)
def test_a_harmed_row_is_noticed(
    evidence: Evidence, store: LocalStore, statement: Any, named: str
) -> None:
    with evidence.database.session(write=True) as session:
        # What no constraint of the database would let pass is seen before it is taken back.
        session.connection().exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        session.execute(statement)
        session.expire_all()
        found = find_in(evidence, session, store)
        session.rollback()
    assert any(named in violation for violation in found), found


def test_a_step_of_two_attempts_is_noticed(evidence: Evidence, store: LocalStore) -> None:
    with evidence.database.session(write=True) as session:
        session.add(JobMetric(job_id=evidence.accepted[0].job_id, attempt=1, step=2, loss=1.0))
    assert any("steps of several attempts: {2:" in violation for violation in find(evidence, store))


def _lose_a_blob(store: LocalStore, settings: Settings) -> None:
    next((settings.root / "blobs").iterdir()).unlink()


def _lose_an_adapter(store: LocalStore, settings: Settings) -> None:
    store.delete_adapter(next(store.list_adapters()).name)


def _change_a_file(store: LocalStore, settings: Settings) -> None:
    (path,) = (settings.root / "adapters").iterdir()
    (path / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_lose_a_blob, "blobs that are referenced are missing"),
        (_lose_an_adapter, "adapters that are referenced are missing"),
        (_change_a_file, "do not match its digest"),
    ],
)
def test_harm_to_the_store_is_noticed(
    evidence: Evidence,
    store: LocalStore,
    settings: Settings,
    harm: Callable[[LocalStore, Settings], None],
    named: str,
) -> None:
    harm(store, settings)
    found = find(evidence, store)
    assert any(named in violation for violation in found), found


def test_what_nothing_refers_to_is_collected(
    evidence: Evidence, store: LocalStore, settings: Settings
) -> None:
    store.write_blob([b"an interrupted upload"], 100)
    (settings.root / "tmp" / "leftover").write_bytes(b"half of one")
    assert find(evidence, store) == []
    assert len(list(store.list_blobs())) == 1
    assert list(store.list_temporary()) == []
