from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from core import jobs, quotas
from core.auth import LOCAL
from core.config import Settings
from core.db.session import Database
from core.errors import InvalidInput, NotFound, QuotaExceeded
from core.specs import JobSpec
from core.storage import ArtifactStore
from tests.support.factories import (
    ROWS,
    add_base_model,
    add_dataset,
    add_project,
    make_spec,
    must_claim,
    queue_job,
    submit,
)


@pytest.fixture(autouse=True)
def _base_model(database: Database) -> None:
    add_base_model(database)


def limited(settings: Settings, **values: int) -> Settings:
    return settings.model_copy(update={f"quota_{name}": value for name, value in values.items()})


def test_a_project_has_only_so_many_jobs_waiting(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    chosen = limited(settings, queued_jobs=3)
    other = add_project(database, "other")
    queue_job(database, store, chosen)
    paused = submit(database, store, chosen, key="k")
    submit(database, store, chosen)
    with database.session(write=True) as session:
        jobs.pause(session, LOCAL, paused.id)
    with pytest.raises(QuotaExceeded) as caught:
        submit(database, store, chosen)
    assert caught.value.as_dict() == {
        "code": "quota_exceeded",
        "message": "the project has 3 jobs waiting and may have 3",
        "hint": "Retry when some have started, cancel some, or ask the operator for more.",
        "limit": {"name": "queued_jobs", "value": 3, "used": 3},
        "retry_after_seconds": 30,
    }
    assert submit(database, store, chosen, key="k").id == paused.id, "this one is no new job"
    submit(database, store, chosen, other)
    running = must_claim(database, "w")
    submit(database, store, chosen)
    jobs.fail(database, running, "w", {"code": "x", "message": "y"})
    with database.session(write=True) as session, pytest.raises(QuotaExceeded):
        jobs.retry(session, LOCAL, running.job_id, settings=chosen)


@pytest.mark.parametrize("limit", [3, 0])
def test_racing_requests_do_not_share_the_last_place(
    database: Database, store: ArtifactStore, settings: Settings, limit: int
) -> None:
    chosen = limited(settings, queued_jobs=limit)
    dataset = add_dataset(database, store)
    start = threading.Barrier(8)

    def send(_: int) -> bool:
        start.wait()
        try:
            submit(database, store, chosen, dataset=dataset.id)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(send, range(8))) == (limit or 8)


def test_rows_and_bytes_are_limited_together_over_all_data_sets(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    stored = add_dataset(database, store)
    spec = make_spec(rows=ROWS * 2)
    with pytest.raises(QuotaExceeded) as rows:
        submit_spec(database, store, limited(settings, stored_rows=2), spec)
    assert (rows.value.limit, rows.value.value, rows.value.used) == ("stored_rows", 2, 1)
    assert rows.value.retry_after_seconds is None
    limit = stored.bytes * 3 - 1
    with pytest.raises(QuotaExceeded) as size:
        submit_spec(database, store, limited(settings, stored_bytes=limit), spec)
    assert (size.value.limit, size.value.used) == ("stored_bytes", stored.bytes)
    assert "may store" in size.value.message
    enough = limited(settings, stored_rows=3, stored_bytes=stored.bytes * 3)
    submit_spec(database, store, enough, spec)


def test_the_rows_of_a_refused_job_are_not_kept(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    spec = make_spec(rows=ROWS * 3)
    refusing = limited(settings, queued_jobs=1)
    submit(database, store, refusing)
    before = {blob.name for blob in store.list_blobs()}
    with pytest.raises(QuotaExceeded):
        submit_spec(database, store, refusing, spec)
    assert {blob.name for blob in store.list_blobs()} == before
    with pytest.raises(InvalidInput):
        submit_spec(database, store, settings, make_spec(rows=ROWS * 3, base_model="absent"))
    assert {blob.name for blob in store.list_blobs()} == before
    with pytest.raises(QuotaExceeded):
        submit_spec(database, store, refusing, make_spec())
    assert {blob.name for blob in store.list_blobs()} == before, "another job has the same rows"


def submit_spec(
    database: Database, store: ArtifactStore, settings: Settings, spec: JobSpec
) -> None:
    jobs.accept(database, LOCAL, spec, settings=settings, store=store)


def test_a_project_can_have_quotas_of_its_own(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    add_project(database, "team")
    with database.session(write=True) as session:
        changed = quotas.set_quotas(
            session, settings, "team", {"queued_jobs": 5, "stored_rows": 0, "running_jobs": None}
        )
    assert changed.quotas == {
        "queued_jobs": 5,
        "running_jobs": None,
        "stored_rows": None,
        "stored_bytes": None,
    }
    assert changed.own == ["queued_jobs", "stored_rows"]
    with database.session(write=True) as session:
        back = quotas.set_quotas(session, settings, "team", {"queued_jobs": None})
        assert (back.quotas["queued_jobs"], back.own) == (1000, ["stored_rows"])
        with pytest.raises(NotFound) as unknown:
            quotas.set_quotas(session, settings, "tea\x00", {"queued_jobs": 1})
        assert unknown.value.code == "unknown_project"
        for bad in (-1, 2**31):
            with pytest.raises(InvalidInput) as invalid:
                quotas.set_quotas(session, settings, "team", {"queued_jobs": bad})
            assert (invalid.value.code, invalid.value.field) == ("invalid_quota", "queued_jobs")
        assert [project.name for project in quotas.list_projects(session, settings)] == [
            "default",
            "team",
        ]


def test_usage_shows_what_ended_and_what_counts_for_each_quota(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    queue_job(database, store, settings)
    claim = must_claim(database, "w")
    jobs.record(database, claim, "w", [jobs.ProgressUpdate(step=1, trained_tokens=40)])
    jobs.fail(database, claim, "w", {"code": "x", "message": "y"})
    queue_job(database, store, settings)
    must_claim(database, "w")
    submit(database, store, settings)
    other = add_project(database, "other")
    submit(database, store, settings, other)
    size = len((json.dumps(ROWS[0]) + "\n").encode())
    with database.session() as session:
        found = quotas.usage(session, LOCAL, limited(settings, stored_rows=9))
        strange = quotas.usage(session, other, settings)
    assert (found.ended_jobs, found.trained_tokens) == ({"failed": 1}, 40)
    assert {name: (quota.limit, quota.used) for name, quota in found.quotas.items()} == {
        "queued_jobs": (1000, 1),
        "running_jobs": (None, 1),
        "stored_rows": (9, 3),
        "stored_bytes": (None, 3 * size),
    }
    assert (strange.ended_jobs, strange.quotas["queued_jobs"].used) == ({}, 1)
