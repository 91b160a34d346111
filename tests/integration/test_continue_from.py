"""Going on from an adapter: which one is settled at submission, and kept until the job ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core import jobs, registry
from core.auth import LOCAL, Principal
from core.config import Settings
from core.db.session import Database
from core.errors import Conflict, InvalidInput, NotFound
from core.housekeeping import Report
from core.housekeeping.garbage import collect_garbage
from core.jobs.dry_runs import start_dry_run
from core.storage import LocalStore
from tests.support.factories import (
    add_base_model,
    add_project,
    make_spec,
    must_claim,
    publish_artifact,
    queue_job,
    submit,
)
from worker.training import TrainStage

# What `publish_artifact` makes.
SHAPE = {"r": 2, "alpha": 4.0}


@pytest.fixture
def digests(database: Database, store: LocalStore, tmp_path: Path) -> list[str]:
    """Two versions of `bot`; `stable` is the first."""
    add_base_model(database)
    published = [publish_artifact(store, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    with database.session(write=True) as session:
        for adapter in published:
            registry.import_adapter(
                session,
                LOCAL,
                name="bot",
                published=adapter,
                base_model="tiny",
                provenance={},
                store=store,
            )
        registry.move_alias(session, LOCAL, "bot", "stable", 1)
    return [adapter.digest for adapter in published]


def refusal(
    database: Database,
    store: LocalStore,
    settings: Settings,
    principal: Principal = LOCAL,
    **fields: Any,
) -> InvalidInput:
    fields = {"continue_from": "bot", "lora": SHAPE} | fields
    with pytest.raises(InvalidInput) as caught:
        submit(database, store, settings, principal, **fields)
    with pytest.raises(InvalidInput) as tried:
        start_dry_run(database, principal, make_spec(**fields), settings=settings)
    assert tried.value.code == caught.value.code
    return caught.value


@pytest.mark.parametrize(
    ("reference", "version"), [("bot", 2), ("bot@1", 1), ("bot:stable", 1), ("bot:latest", 2)]
)
def test_a_reference_is_settled_at_submission(
    database: Database,
    store: LocalStore,
    settings: Settings,
    digests: list[str],
    reference: str,
    version: int,
) -> None:
    job = queue_job(database, store, settings, continue_from=reference, lora=SHAPE)
    assert job.spec.continue_from == f"bot@{version}"
    with database.session(write=True) as session:
        registry.move_alias(session, LOCAL, "bot", "latest", 1)
        registry.move_alias(session, LOCAL, "bot", "stable", 2)
    assert must_claim(database, "worker").continue_digest == digests[version - 1]


def test_what_does_not_fit_is_named(
    database: Database, store: LocalStore, settings: Settings, digests: list[str]
) -> None:
    def code(**fields: Any) -> str:
        return refusal(database, store, settings, **fields).code

    error = refusal(database, store, settings, lora={"r": 8, "target_modules": ["q_proj"]})
    assert (error.code, error.field) == ("continue_shape_mismatch", "continue_from")
    for part in ("lora.r is 8", "lora.alpha is 16", "lora.target_modules", "q_proj, v_proj"):
        assert part in error.message
    assert "lora.r " not in refusal(database, store, settings, lora={"r": 2, "alpha": 8.0}).message
    assert code(lora={**SHAPE, "use_rslora": True}) == "continue_shape_mismatch"
    add_base_model(database, "other", digest="c" * 64)
    assert code(base_model="other") == "continue_base_mismatch"
    assert code(continue_from="nobody") == "unknown_adapter"
    assert code(continue_from="bot@9") == "unknown_adapter"
    assert code(continue_from="bot@@") == "invalid_adapter_reference"
    stranger = add_project(database, "strangers")
    assert refusal(database, store, settings, stranger).code == "unknown_adapter"


def test_an_adapter_that_a_job_goes_on_from_is_kept_until_the_job_ends(
    database: Database, store: LocalStore, settings: Settings, digests: list[str]
) -> None:
    job = queue_job(database, store, settings, continue_from="bot@1", lora=SHAPE)
    with database.session(write=True) as session:
        with pytest.raises(Conflict) as caught:
            registry.delete_version(session, LOCAL, "bot", 1, force=True)
        assert caught.value.code == "continued_by_job"
        assert job.id in caught.value.message
        with pytest.raises(Conflict):
            registry.delete_adapter(session, LOCAL, "bot", force=True)
        registry.delete_version(session, LOCAL, "bot", 2, force=True)
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
    with database.session(write=True) as session:
        registry.delete_version(session, LOCAL, "bot", 1, force=True)
    assert registry.discard_artifact(database, store, digests[0])
    with database.session(write=True) as session, pytest.raises(Conflict) as gone:
        jobs.retry(session, LOCAL, job.id, settings=settings)
    assert gone.value.code == "input_missing"


def test_its_files_are_no_garbage_while_a_job_waits(
    database: Database, store: LocalStore, settings: Settings, digests: list[str]
) -> None:
    queue_job(database, store, settings, continue_from="bot@1", lora=SHAPE)
    with database.session(write=True) as session:
        session.connection().exec_driver_sql("DELETE FROM adapter_aliases")
        session.connection().exec_driver_sql("DELETE FROM adapter_versions")
    assert not registry.discard_artifact(database, store, digests[0])
    collect_garbage(database, store, 0.0, Report(), force=True)
    assert [store.has_adapter(digest) for digest in digests] == [True, False]


def test_the_trainer_gets_the_files_or_the_job_a_clear_end(
    database: Database, store: LocalStore, settings: Settings, digests: list[str], tmp_path: Path
) -> None:
    queue_job(database, store, settings, continue_from="bot@1", lora=SHAPE)
    claim = must_claim(database, "worker")
    stage = TrainStage(settings, store)
    assert stage._continue_dir(claim.continue_digest) == str(store.adapter_path(digests[0]))
    assert stage._continue_dir(None) is None
    store.delete_adapter(digests[0])
    with pytest.raises(NotFound) as caught:
        stage._continue_dir(claim.continue_digest)
    assert (caught.value.code, caught.value.field) == ("continue_missing", "continue_from")
