"""What `promote` does to aliases, and how a quarantined version is kept from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core import jobs, registry
from core.auth import LOCAL
from core.config import Settings
from core.db.session import Database
from core.errors import Conflict, NotFound
from core.reads import JobRead
from core.storage import LocalStore
from tests.support.factories import add_base_model, must_claim, publish_artifact, queue_job

BETTER = {"verdict": {"better": True, "compared_with": "base", "reasons": []}}
WORSE = {"verdict": {"better": False, "compared_with": "base", "reasons": ["too bad", "so bad"]}}
IF_BETTER = {
    "promote": "if_better",
    "data": {"validation_fraction": 0.5},
    "evaluation": {"max_forgetting": 0.1},
}


class Publisher:
    """Publishes jobs of one adapter as a worker does, without training."""

    def __init__(
        self, database: Database, store: LocalStore, settings: Settings, root: Path
    ) -> None:
        add_base_model(database)
        self._database, self._store, self._settings = database, store, settings
        self._published = publish_artifact(store, root / "artifact")

    def publish(self, report: dict[str, Any], **spec: Any) -> JobRead:
        """Return a job that has succeeded with this report."""
        job = queue_job(self._database, self._store, self._settings, adapter="bot", **spec)
        jobs.succeed(
            self._database,
            must_claim(self._database, "w"),
            "w",
            manifest=self._published.manifest,
            bytes=self._published.bytes,
            report=report,
            provenance={},
            store=self._store,
        )
        with self._database.session() as session:
            return jobs.get(session, LOCAL, job.id)

    def events(self, job: JobRead) -> dict[str, dict[str, Any]]:
        """Return the job's events by type."""
        with self._database.session() as session:
            found = jobs.events(session, LOCAL, job.id, limit=100).data
        return {event.type: event.data for event in found}

    def latest(self) -> int | None:
        """Return the version that the bare name means."""
        with self._database.session() as session:
            return registry.get_adapter(session, LOCAL, "bot").latest


@pytest.fixture
def publisher(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> Publisher:
    return Publisher(database, store, settings, tmp_path)


def test_always_promotes_whatever_the_report_says(publisher: Publisher) -> None:
    job = publisher.publish(WORSE)
    assert publisher.latest() == 1
    assert publisher.events(job)["succeeded"]["promoted"] is True
    assert job.version is not None
    assert job.version.quarantine is None


def test_a_manual_version_waits_for_somebody_to_promote_it(
    publisher: Publisher, database: Database
) -> None:
    job = publisher.publish(BETTER, promote="manual")
    assert publisher.events(job)["succeeded"]["promoted"] is False
    assert publisher.latest() is None
    with database.session() as session:
        with pytest.raises(NotFound) as caught:
            registry.resolve(session, LOCAL, "bot")
        assert registry.resolve(session, LOCAL, "bot@1").version == 1
    assert caught.value.code == "no_latest_version"
    assert "bot@1" in str(caught.value.hint)
    with database.session(write=True) as session:
        assert registry.move_alias(session, LOCAL, "bot", "latest", 1).latest == 1


def test_what_is_no_better_is_quarantined_until_it_is_released(
    publisher: Publisher, database: Database
) -> None:
    publisher.publish(BETTER, **IF_BETTER)
    assert publisher.latest() == 1
    job = publisher.publish(WORSE, **IF_BETTER)
    assert job.status == "succeeded"
    assert job.version is not None
    assert job.version.quarantine == "too bad; so bad"
    assert publisher.events(job)["quarantined"]["reason"] == "too bad; so bad"
    assert publisher.latest() == 1
    with database.session(write=True) as session:
        # Its owner may look at it, by its number alone.
        assert registry.resolve(session, LOCAL, "bot@2").version == 2
        assert registry.resolve(session, LOCAL, "bot").version == 1
        for alias in ("latest", "beta"):
            with pytest.raises(Conflict) as caught:
                registry.move_alias(session, LOCAL, "bot", alias, 2)
            assert caught.value.code == "version_quarantined"
            assert "/adapters/bot/versions/2/release" in str(caught.value.hint)
        assert registry.get_version(session, LOCAL, "bot", 2).quarantine == "too bad; so bad"
    with database.session(write=True) as session:
        assert registry.release(session, LOCAL, "bot", 2).quarantine is None
        assert registry.release(session, LOCAL, "bot", 2).aliases == []
        assert registry.get_adapter(session, LOCAL, "bot").latest == 1
    with database.session(write=True) as session:
        assert registry.move_alias(session, LOCAL, "bot", "latest", 2).latest == 2


def test_no_verdict_is_no_evidence(publisher: Publisher) -> None:
    job = publisher.publish({"samples": []}, **IF_BETTER)
    assert job.version is not None
    assert job.version.quarantine == "there is no evidence for it"
    assert publisher.latest() is None


def test_a_deleted_version_leaves_its_alias_to_none_that_is_quarantined(
    publisher: Publisher, database: Database
) -> None:
    publisher.publish(BETTER)
    publisher.publish(WORSE, **IF_BETTER)
    publisher.publish(BETTER)
    with database.session(write=True) as session:
        registry.delete_version(session, LOCAL, "bot", 3, force=True)
    assert publisher.latest() == 1
    with database.session(write=True) as session:
        registry.delete_version(session, LOCAL, "bot", 1, force=True)
    assert publisher.latest() is None
