"""Commands that move jobs, and the operator's commands for projects, on real parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core import jobs
from core.auth import LOCAL
from core.config import Settings
from core.db.session import Database
from core.storage import ArtifactStore
from tests.support.command_line import live_api, succeed, tunesmith
from tests.support.factories import add_base_model, must_claim, queue_job
from tests.support.fake_engine import FakeEngine


@pytest.fixture(autouse=True)
def _url(
    settings: Settings, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    add_base_model(sqlite_database)
    with live_api(settings, FakeEngine()) as url:
        monkeypatch.setenv("TUNESMITH_URL", url)
        yield


def test_a_job_is_paused_resumed_reordered_and_retried(
    sqlite_database: Database, store: ArtifactStore, settings: Settings
) -> None:
    job = queue_job(sqlite_database, store, settings).id
    assert succeed("jobs", "pause", job).stdout.split() == [job, "paused"]
    assert succeed("jobs", "resume", job).stdout.split() == [job, "queued"]
    assert succeed("jobs", "priority", job, "5").stdout.split() == [job, "priority", "5"]
    assert succeed("jobs", "priority", job, "--json", "--", "-3").json["priority"] == -3
    shown = succeed("jobs", "show", job).stdout
    assert "no train worker is running" in shown

    claim = must_claim(sqlite_database, "w")
    assert succeed("jobs", "checkpoints", job).stdout.strip() == "No checkpoints."
    blob = store.write_blob([b"state"], 100)
    jobs.add_checkpoint(sqlite_database, claim, "w", step=7, blob=blob, store=store)
    jobs.reject_checkpoint(
        sqlite_database,
        claim,
        "w",
        checkpoint=jobs.CheckpointRef(7, claim.attempt, blob.sha256, blob.bytes),
        reason="it is torn",
    )
    assert "unusable: it is torn" in succeed("jobs", "checkpoints", job).stdout
    (listed,) = succeed("jobs", "checkpoints", job, "--json").json
    assert (listed["step"], listed["usable"]) == (7, False)
    assert succeed("jobs", "pause", job).stdout.split() == [job, "pausing"]
    assert succeed("jobs", "cancel", job).stdout.split() == [job, "stopping"]
    jobs.cancelled(sqlite_database, claim, "w")
    assert succeed("jobs", "retry", job).stdout.split() == [job, "queued"]
    refused = tunesmith("jobs", "retry", job)
    assert refused.code == 1
    assert "job_not_finished" in refused.stderr


def test_the_operator_sets_quotas(
    sqlite_database: Database, store: ArtifactStore, settings: Settings, tmp_path: Path
) -> None:
    at = ["--data-dir", settings.root]
    changed = succeed("projects", "quota", "default", "--queued-jobs", "1", *at)
    assert "queued_jobs 1*" in changed.stdout
    (listed,) = succeed("projects", "list", "--json", *at).json
    assert (listed["name"], listed["quotas"]["queued_jobs"], listed["own"]) == (
        "default",
        1,
        ["queued_jobs"],
    )
    assert "no limit" in succeed("projects", "list", *at).stdout
    queue_job(sqlite_database, store, settings)
    with sqlite_database.session() as session:
        assert len(jobs.list_jobs(session, LOCAL).data) == 1
    spec = tmp_path / "spec.json"
    spec.write_text('{"base_model": "tiny", "rows": [{"prompt": "a", "completion": "b"}]}')
    refused = tunesmith("jobs", "submit", spec)
    assert (refused.code, "quota_exceeded" in refused.stderr) == (1, True)
    succeed("projects", "quota", "default", "--queued-jobs", "default", *at)
    succeed("jobs", "submit", spec)
    for arguments in (["default", "--queued-jobs", "many"], ["default", "--stored-rows", "-1"]):
        assert tunesmith("projects", "quota", *arguments, *at).code == 2
    unknown = tunesmith("projects", "quota", "nobody", "--queued-jobs", "1", *at)
    assert (unknown.code, "unknown_project" in unknown.stderr) == (1, True)
