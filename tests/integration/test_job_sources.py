"""Jobs with several data sets: kept, claimed, retried; nobody deletes what they need."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import func, select

from core import datasets, jobs
from core.config import Settings
from core.db.models import Dataset, Job, JobSource
from core.db.repositories.backup import forget_blob
from core.db.session import Database
from core.errors import Conflict, Forbidden, InvalidInput, QuotaExceeded
from core.principal import LOCAL
from core.reads import DatasetRead
from core.storage import LocalStore
from tests.support.factories import (
    ROWS,
    add_base_model,
    add_dataset,
    add_project,
    make_spec,
    must_claim,
    submit,
)

HUB = "hf:acme/pairs@main"


@pytest.fixture(autouse=True)
def base_model(database: Database) -> None:
    add_base_model(database)


def dataset(database: Database, store: LocalStore, text: str) -> DatasetRead:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return add_dataset(database, store, content=json.dumps({"messages": turns}).encode())


def delete(database: Database, dataset_id: str) -> None:
    with database.session(write=True) as session:
        datasets.delete(session, LOCAL, dataset_id)


def count(database: Database, table: type[Any]) -> int:
    with database.session() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_claim_has_all_data_sets_and_those_that_validate_last(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    one, two, held = (dataset(database, store, text) for text in "abc")
    job = submit(
        database,
        store,
        settings,
        rows=None,
        datasets=[{"dataset": one.id}, {"dataset": two.id, "weight": 0.5}],
        data={"validation_dataset": held.id},
    )
    assert job.dataset == one.id
    assert job.spec.datasets is not None
    assert (job.spec.dataset, job.spec.datasets[1].dataset) == (None, two.id)
    claim = must_claim(database, "light", "validate")
    assert [(s.reference, s.role, s.weight, s.sha256, s.format) for s in claim.sources] == [
        (one.id, "training", 1.0, one.sha256, "messages"),
        (two.id, "training", 0.5, two.sha256, "messages"),
        (held.id, "validation", 1.0, held.sha256, "messages"),
    ]
    jobs.validated(database, claim, "light", {})
    assert must_claim(database, "trainer", "train").sources == claim.sources


def test_a_single_data_set_needs_no_list(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    job = submit(database, store, settings)
    assert count(database, JobSource) == 0
    claim = must_claim(database, "light", "validate")
    assert [source.reference for source in claim.sources] == [job.dataset]


def test_inline_rows_may_have_a_data_set_for_validation(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    held = dataset(database, store, "x")
    job = submit(database, store, settings, data={"validation_dataset": held.id})
    claim = must_claim(database, "light", "validate")
    assert [source.reference for source in claim.sources] == [job.dataset, held.id]
    assert job.spec.dataset == job.dataset


def test_no_data_set_of_an_unfinished_job_is_deleted(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    one, two, held = (dataset(database, store, text) for text in "abc")
    sources = [{"dataset": one.id}, {"dataset": two.id}]
    job = submit(
        database, store, settings, rows=None, datasets=sources,
        data={"validation_dataset": held.id},
    )  # fmt: skip
    for needed in (one, two, held):
        with pytest.raises(Conflict) as caught:
            delete(database, needed.id)
        assert caught.value.code == "dataset_in_use"
        with database.session(write=True) as session:
            forget_blob(session, needed.sha256)
    assert count(database, Dataset) == 3
    idle = dataset(database, store, "idle")
    with database.session(write=True) as session:
        forget_blob(session, idle.sha256)
    assert count(database, Dataset) == 3
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
    delete(database, two.id)
    with database.session(write=True) as session:
        forget_blob(session, held.sha256)
    assert count(database, Dataset) == 1

    with database.session(write=True) as session, pytest.raises(Conflict) as caught:
        jobs.retry(session, LOCAL, job.id, settings=settings)
    assert caught.value.code == "input_missing"
    assert two.id in caught.value.message
    with database.session(write=True) as session:
        jobs.delete(session, LOCAL, job.id)
    assert count(database, JobSource) == 0


def test_a_job_whose_data_set_is_gone_fails_at_its_claim(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    one, two = (dataset(database, store, text) for text in "ab")
    sources = [{"dataset": one.id}, {"dataset": two.id}]
    job = submit(database, store, settings, rows=None, datasets=sources)
    with database.session(write=True) as session:
        session.delete(session.get(Dataset, two.id))
    assert jobs.claim(database, worker_id="w", stage="validate", lease_seconds=9) is None
    with database.session() as session:
        error = jobs.get(session, LOCAL, job.id).error
    assert error is not None
    assert error["code"] == "input_missing"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rows": None, "datasets": [{"dataset": "file-none"}]}, "datasets.0.dataset"),
        ({"data": {"validation_dataset": "file-none"}}, "data.validation_dataset"),
    ],
)
def test_an_unknown_data_set_is_named_by_its_field(
    database: Database, store: LocalStore, settings: Settings, fields: dict[str, Any], field: str
) -> None:
    for start in (
        lambda: submit(database, store, settings, **fields),
        lambda: jobs.start_dry_run(database, LOCAL, make_spec(**fields), settings=settings),
    ):
        with pytest.raises(InvalidInput) as caught:
            start()
        assert (caught.value.code, caught.value.field) == ("unknown_dataset", field)


def test_a_data_set_of_another_project_is_unknown(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    theirs = add_dataset(database, store, add_project(database, "other"))
    with pytest.raises(InvalidInput) as caught:
        submit(database, store, settings, data={"validation_dataset": theirs.id})
    assert caught.value.code == "unknown_dataset"


def test_data_sets_of_the_hub_need_the_operators_leave(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    for allowed, code in (
        ("", "hub_datasets_disabled"),
        ("other/*, acme/other", "hub_dataset_not_allowed"),
    ):
        limited = settings.model_copy(update={"hub_datasets": allowed})
        with pytest.raises(Forbidden) as caught:
            submit(database, store, limited, dataset=HUB)
        assert (caught.value.code, caught.value.field) == (code, "dataset")
        with pytest.raises(Forbidden):
            jobs.start_dry_run(
                database,
                LOCAL,
                make_spec(data={"validation_dataset": HUB}),
                settings=limited,
            )
    assert count(database, Job) == 0
    submit(database, store, settings.model_copy(update={"hub_datasets": "acme/*"}), dataset=HUB)


def test_fetched_rows_become_data_sets_of_the_project(
    database: Database, store: LocalStore, settings: Settings
) -> None:
    allowing = settings.model_copy(update={"hub_datasets": "acme/pairs"})
    job = submit(
        database, store, allowing, dataset=HUB, split="train[:1%]",
        data={"validation_dataset": HUB},
    )  # fmt: skip
    claim = must_claim(database, "light", "validate")
    assert [(s.name, s.sha256, s.format) for s in claim.sources] == [
        (f"{HUB} train[:1%]", "", None), (f"{HUB} validation", "", None),
    ]  # fmt: skip
    report = {"format": "messages", "rows": 1, "commit": "c" * 40}
    blobs = [
        store.write_blob([json.dumps(ROWS[0]).encode(), b"\n" * number], 10**6) for number in (0, 1)
    ]
    fetched = [jobs.FetchedRows(at, blob, report) for at, blob in enumerate(blobs)]
    crowded = allowing.model_copy(update={"quota_stored_rows": 1})
    with pytest.raises(QuotaExceeded):
        jobs.validated(database, claim, "light", {}, fetched=fetched, settings=crowded, store=store)
    assert count(database, Dataset) == 0
    jobs.validated(database, claim, "light", {}, fetched=fetched, settings=allowing, store=store)
    trained = must_claim(database, "trainer", "train")
    assert [source.sha256 for source in trained.sources] == [blob.sha256 for blob in blobs]
    with database.session() as session:
        kept = datasets.list_datasets(session, LOCAL).data
        assert jobs.get(session, LOCAL, job.id).dataset == kept[-1].id
    assert [one.filename for one in kept] == [
        "hf:acme:pairs@main validation", "hf:acme:pairs@main train[:1%]",
    ]  # fmt: skip
    assert kept[0].report["commit"] == "c" * 40
    with pytest.raises(Conflict):
        delete(database, kept[0].id)
