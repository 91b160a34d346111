from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from core import jobs
from tests.support.api import ROWS, Api, running_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def post(api: Api, job: dict[str, Any], action: str) -> httpx2.Response:
    answer: httpx2.Response = api.client.post(f"/jobs/{job['id']}/{action}")
    return answer


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_a_waiting_job_is_paused_and_resumed(api: Api) -> None:
    job = api.submit()
    api.queue.woken.clear()
    paused = post(api, job, "pause")
    assert (paused.status_code, paused.json()["status"]) == (202, "paused")
    assert post(api, job, "pause").json() == paused.json()
    resumed = post(api, job, "resume")
    assert (resumed.status_code, resumed.json()["status"]) == (202, "validating")
    assert api.queue.woken == ["light"]
    assert code(post(api, job, "resume")) == (409, "job_not_paused")
    jobs.validated(api.database, api.claim("validate"), "w", {"rows": 3})
    post(api, job, "pause")
    assert post(api, job, "resume").json()["status"] == "queued"
    assert api.queue.woken == ["light", "train"]


def test_the_worker_of_a_running_job_is_asked_to_pause_it(api: Api) -> None:
    job = api.submit()
    claim = api.start_training()
    asked = post(api, job, "pause").json()
    assert (asked["status"], asked["stop_requested"]) == ("running", "pause")
    assert post(api, job, "resume").json()["stop_requested"] is None
    post(api, job, "pause")
    jobs.release(api.database, claim, "w")
    assert api.client.get(f"/jobs/{job['id']}").json()["status"] == "paused"
    assert post(api, job, "cancel").json()["status"] == "cancelled"
    types = [event["type"] for event in api.client.get(f"/jobs/{job['id']}/events").json()["data"]]
    assert types[4:] == [
        "pause_requested",
        "pause_withdrawn",
        "pause_requested",
        "released",
        "paused",
        "cancelled",
    ]


def test_a_job_that_is_being_cancelled_is_not_paused(api: Api) -> None:
    job = api.submit()
    api.start_training()
    post(api, job, "cancel")
    refused = post(api, job, "pause")
    assert code(refused) == (409, "cancel_requested")
    assert "Retry it" in refused.json()["hint"]


def test_a_failed_job_is_retried(api: Api) -> None:
    job = api.submit()
    assert code(post(api, job, "retry")) == (409, "job_not_finished")
    jobs.fail(api.database, api.start_training(), "w", {"code": "broken", "message": "it broke"})
    for action in ("pause", "cancel"):
        assert code(post(api, job, action)) == (409, "job_finished")
    assert "/retry" in post(api, job, "resume").json()["hint"]
    api.queue.woken.clear()
    retried = post(api, job, "retry")
    assert (retried.status_code, retried.json()["status"]) == (202, "queued")
    assert retried.json()["error"] is None
    assert api.queue.woken == ["train"]


def test_the_priority_of_a_job_is_changed(api: Api) -> None:
    first, second = api.submit(), api.submit()
    changed = api.client.patch(f"/jobs/{second['id']}", json={"priority": 7})
    assert changed.status_code == 200
    assert (changed.json()["priority"], changed.json()["spec"]["priority"]) == (7, 7)
    positions = [
        api.client.get(f"/jobs/{job['id']}").json()["progress"]["queue_position"]
        for job in (first, second)
    ]
    assert positions == [1, 0]
    post(api, second, "cancel")
    late = api.client.patch(f"/jobs/{second['id']}", json={"priority": 1})
    assert code(late) == (409, "job_finished")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "priority"),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"priority": "7"}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": None}, "priority"),
        ({"priority": 10**30}, "priority"),
        ({"priority": 1, "status": "succeeded"}, "status"),
    ],
)
def test_a_change_that_cannot_be_is_refused(api: Api, body: dict[str, Any], field: str) -> None:
    job = api.submit()
    refused = api.client.patch(f"/jobs/{job['id']}", json=body)
    assert refused.status_code == 422, refused.text
    assert refused.json()["field"] == field
    assert api.client.get(f"/jobs/{job['id']}").json()["priority"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"7", b"\xff"])
def test_a_body_that_is_no_change_is_refused(api: Api, body: bytes) -> None:
    job = api.submit()
    headers = {"Content-Type": "application/json"}
    refused = api.client.patch(f"/jobs/{job['id']}", content=body, headers=headers)
    assert refused.status_code in (400, 422), refused.text


@pytest.mark.parametrize("job_id", ["job-none", "x" * 300, "job-%ff", "ü"])
def test_an_unknown_job_cannot_be_controlled(api: Api, job_id: str) -> None:
    answers = [
        *(api.client.post(f"/jobs/{job_id}/{a}") for a in ("cancel", "pause", "resume", "retry")),
        api.client.patch(f"/jobs/{job_id}", json={"priority": 1}),
        api.client.get(f"/jobs/{job_id}/checkpoints"),
        api.client.delete(f"/jobs/{job_id}"),
    ]
    assert {code(answer) for answer in answers} == {(404, "unknown_job")}


def test_checkpoints_are_listed(api: Api) -> None:
    job = api.submit()
    path = f"/jobs/{job['id']}/checkpoints"
    assert api.client.get(path).json() == {"data": [], "next_cursor": None}
    claim = api.start_training()
    for step in (2, 4):
        blob = api.store.write_blob([b"state %d" % step], 100)
        jobs.add_checkpoint(api.database, claim, "w", step=step, blob=blob, store=api.store)
    newest, older = api.client.get(path).json()["data"]
    assert (newest["step"], older["step"]) == (4, 2)
    del newest["created_at"]
    assert newest == {"step": 4, "attempt": 2, "bytes": 7, "usable": True, "reason": None}


def test_quotas_answer_with_their_name_and_when_to_come_back(tmp_path: Path) -> None:
    with running_api(tmp_path, quota_queued_jobs=1, quota_stored_rows=5) as api:
        dataset = api.upload()
        before = api.blobs()
        api.submit(rows=None, dataset=dataset["id"])
        body = {"base_model": "tiny", "rows": ROWS}
        busy = api.client.post("/jobs", json=body)
        assert code(busy) == (429, "quota_exceeded")
        assert busy.headers["retry-after"] == "30"
        assert busy.json()["limit"] == {"name": "queued_jobs", "value": 1, "used": 1}

        full = api.client.post("/datasets", files={"file": ("r.jsonl", _other_rows())})
        assert code(full) == (403, "quota_exceeded")
        assert "retry-after" not in full.headers
        assert full.json()["limit"] == {"name": "stored_rows", "value": 5, "used": 3}
        assert "Delete data sets" in full.json()["hint"]
        assert api.blobs() == before, "what was refused was not kept"

        usage = api.client.get("/usage").json()
        assert usage["quotas"]["stored_rows"] == {"limit": 5, "used": 3}
        assert usage["quotas"]["running_jobs"] == {"limit": None, "used": 0}
        assert usage["ended_jobs"] == {}


def test_an_import_counts_as_stored_bytes(tmp_path: Path) -> None:
    from tests.support.api import adapter_files, pack

    with running_api(tmp_path, quota_stored_bytes=100) as api:
        refused = api.import_adapter("bot", pack(adapter_files()))
        assert code(refused) == (403, "quota_exceeded")
        assert api.stored_adapters() == set()


def test_another_projects_job_is_a_missing_one(tmp_path: Path) -> None:
    with running_api(tmp_path, auth="keys") as api:
        owner, stranger = api.add_key("a", "train"), api.add_key("b", "train")
        reader = api.add_key("a", "read")
        job = api.client.post(
            "/jobs", json={"base_model": "tiny", "rows": ROWS}, headers=owner
        ).json()

        def answers(job_id: str, headers: dict[str, str]) -> list[tuple[int, str]]:
            path = f"/jobs/{job_id}"
            return [
                code(answer)
                for answer in (
                    *(
                        api.client.post(f"{path}/{action}", headers=headers)
                        for action in ("cancel", "pause", "resume", "retry")
                    ),
                    api.client.patch(path, json={"priority": 1}, headers=headers),
                )
            ]

        assert answers(job["id"], stranger) == answers("job-none", stranger)
        assert set(answers(job["id"], reader)) == {(403, "missing_scope")}
        hidden = api.client.get(f"/jobs/{job['id']}/checkpoints", headers=stranger)
        assert code(hidden) == (404, "unknown_job")
        shown = api.client.get(f"/jobs/{job['id']}", headers=owner).json()
        assert (shown["status"], shown["priority"]) == ("validating", 0)
        assert api.client.get("/usage", headers=reader).json()["quotas"]["queued_jobs"] == {
            "limit": 1000,
            "used": 1,
        }
        theirs = api.client.get("/usage", headers=stranger).json()
        assert theirs["quotas"]["queued_jobs"]["used"] == 0


def _other_rows() -> bytes:
    row = b'{"prompt": "a", "completion": "b"}\n'
    return row * 3
