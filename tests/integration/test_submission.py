from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core import datasets, jobs
from core.auth import LOCAL
from core.config import Settings
from core.db.session import Database
from core.errors import Conflict, InvalidInput, NotFound
from core.storage import LocalStore
from tests.support.factories import (
    ROWS,
    add_base_model,
    add_dataset,
    must_claim,
    queue_job,
    submit,
)


@pytest.fixture(autouse=True)
def _base_model(database: Database) -> None:
    add_base_model(database)


def test_a_submission_is_stored_with_every_default_resolved(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    dataset = add_dataset(database, store)
    job = submit(
        database, store, settings, dataset=dataset.id, adapter="bot", metadata={"team": "x\x00"}
    )
    assert (job.status, job.adapter, job.dataset) == ("validating", "bot", dataset.id)
    assert job.spec.lora.alpha == 32.0
    assert job.spec.dataset == dataset.id
    assert job.metadata == {"team": "x\x00"}
    assert job.progress.step == 0


def test_the_default_adapter_name_comes_from_base_and_job(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    add_base_model(database, "x" * 100)
    short, long = (submit(database, store, settings, base_model=n) for n in ("tiny", "x" * 100))
    assert short.adapter == f"tiny-{short.id[-8:]}"
    assert long.adapter == f"{'x' * 54}-{long.id[-8:]}"
    assert len(long.adapter) == 63


def test_inline_rows_become_a_data_set(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = submit(database, store, settings, rows=ROWS * 2)
    assert job.spec.rows is None
    with database.session() as session:
        dataset = datasets.get(session, LOCAL, job.dataset)
        assert (dataset.rows, dataset.format) == (2, "messages")
        assert datasets.preview(session, LOCAL, store, job.dataset) == [
            {"line": 1, "row": ROWS[0]},
            {"line": 2, "row": ROWS[0]},
        ]


@pytest.mark.parametrize(
    ("fields", "code", "hint"),
    [
        ({"base_model": "tny"}, "unknown_base_model", "tiny"),
        ({"dataset": "file-0"}, "unknown_dataset", "POST /datasets"),
        ({"dataset": "file\x00"}, "unknown_dataset", "POST /datasets"),
        ({"lora": {"target_modules": ["q_prj"]}}, "unknown_target_module", "q_proj"),
        ({"lora": {"target_modules": ["proj"]}}, "unknown_target_module", "q_proj"),
        ({"rows": [{"messages": []}]}, "invalid_dataset", ""),
    ],
)
def test_a_bad_spec_is_refused_with_what_to_do(
    database: Database,
    store: LocalStore,
    settings: Settings,
    fields: dict[str, object],
    code: str,
    hint: str,
) -> None:
    with pytest.raises(InvalidInput) as caught:
        submit(database, store, settings, **fields)
    assert caught.value.code == code
    assert hint in (caught.value.hint or "")
    with database.session() as session:
        assert jobs.list_jobs(session, LOCAL).data == []


@pytest.mark.parametrize(
    "target", ["q_proj", "self_attn.v_proj", "model.layers.1.self_attn.q_proj"]
)
def test_target_modules_are_named_as_peft_matches_them(
    database: Database, store: LocalStore, settings: Settings, target: str
) -> None:
    job = submit(database, store, settings, lora={"target_modules": [target]})
    assert job.spec.lora.target_modules == [target]


def test_an_idempotency_key_gives_one_job(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    first = submit(database, store, settings, key="k", adapter="a")
    assert submit(database, store, settings, key="k", adapter="a").id == first.id
    with pytest.raises(Conflict) as caught:
        submit(database, store, settings, key="k", adapter="b")
    assert caught.value.code == "idempotency_key_reused"
    assert submit(database, store, settings, key="other", adapter="a").id != first.id
    with database.session() as session:
        assert len(datasets.list_datasets(session, LOCAL).data) == 2
    for bad in ("", "x" * 256, "ü", "a\nb"):
        with pytest.raises(InvalidInput):
            submit(database, store, settings, key=bad)


def test_racing_requests_with_one_key_make_one_job(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    start = threading.Barrier(20)

    def send(_: int) -> str:
        start.wait()
        return submit(database, store, settings, key="k").id

    with ThreadPoolExecutor(20) as pool:
        ids = set(pool.map(send, range(20)))
    assert len(ids) == 1
    with database.session() as session:
        assert [job.id for job in jobs.list_jobs(session, LOCAL).data] == list(ids)
        assert len(datasets.list_datasets(session, LOCAL).data) == 1
        assert len(jobs.events(session, LOCAL, ids.pop()).data) == 1


def test_a_key_is_free_again_once_its_job_is_deleted(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    first = submit(database, store, settings, key="k")
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, first.id)
        jobs.delete(session, LOCAL, first.id)
    assert submit(database, store, settings, key="k", adapter="b").id != first.id


def test_a_waiting_job_is_cancelled_at_once(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    for job in (queue_job(database, store, settings), submit(database, store, settings)):
        with database.session(write=True) as session:
            assert jobs.cancel(session, LOCAL, job.id).status == "cancelled"
            again = jobs.cancel(session, LOCAL, job.id)
            assert again.status == "cancelled"
            types = [event.type for event in jobs.events(session, LOCAL, job.id).data]
        assert types.count("cancelled") == 1


def test_a_finished_job_cannot_be_cancelled_and_a_running_one_not_deleted(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = submit(database, store, settings)
    claim = must_claim(database, "w", "validate")
    with database.session(write=True) as session:
        with pytest.raises(Conflict) as caught:
            jobs.delete(session, LOCAL, job.id)
        assert caught.value.code == "job_not_finished"
    jobs.fail(database, claim, "w", {"code": "x", "message": "y"})
    with database.session(write=True) as session:
        with pytest.raises(Conflict) as caught:
            jobs.cancel(session, LOCAL, job.id)
        assert caught.value.code == "job_finished"
        with pytest.raises(NotFound) as missing:
            jobs.report(session, LOCAL, job.id)
        assert missing.value.code == "no_report"
        jobs.delete(session, LOCAL, job.id)
        with pytest.raises(NotFound):
            jobs.get(session, LOCAL, job.id)
        with pytest.raises(NotFound):
            jobs.events(session, LOCAL, job.id)


def test_lists_are_paged_newest_first_and_filtered(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    ids = [submit(database, store, settings, adapter=f"a{i % 2}").id for i in range(5)]
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, ids[0])
    with database.session() as session:
        seen, cursor = [], None
        while True:
            page = jobs.list_jobs(session, LOCAL, cursor=cursor, limit=2)
            seen += [job.id for job in page.data]
            if (cursor := page.next_cursor) is None:
                break
        assert seen == ids[::-1]
        assert [job.id for job in jobs.list_jobs(session, LOCAL, status="cancelled").data] == ids[
            :1
        ]
        assert [j.id for j in jobs.list_jobs(session, LOCAL, adapter="a1").data] == [ids[3], ids[1]]
        assert jobs.list_jobs(session, LOCAL, base_model="none", adapter="\x00").data == []
        with pytest.raises(InvalidInput) as caught:
            jobs.list_jobs(session, LOCAL, cursor="%%%")
    assert caught.value.code == "invalid_cursor"


@pytest.mark.parametrize("job_id", ["", "job-1", "job\x00", "job-\ud800", "x" * 5000])
def test_a_strange_id_is_just_unknown(database: Database, job_id: str) -> None:
    with database.session() as session, pytest.raises(NotFound) as caught:
        jobs.get(session, LOCAL, job_id)
    assert caught.value.code == "unknown_job"


def test_a_data_set_in_use_is_kept(
    database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    dataset = add_dataset(database, store, filename="../../x/rows\x00.jsonl")
    assert dataset.filename == "rows.jsonl"
    job = submit(database, store, settings, dataset=dataset.id)
    with database.session(write=True) as session:
        with pytest.raises(Conflict) as caught:
            datasets.delete(session, LOCAL, dataset.id)
        assert caught.value.code == "dataset_in_use"
        jobs.cancel(session, LOCAL, job.id)
        sha256 = datasets.delete(session, LOCAL, dataset.id)
    assert datasets.discard_blob(database, store, sha256)
    with pytest.raises(NotFound):
        store.blob_path(sha256)
    with database.session() as session:
        assert jobs.get(session, LOCAL, job.id).dataset == dataset.id
