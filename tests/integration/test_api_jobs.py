from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from core import jobs
from core.jobs import EventUpdate, MetricUpdate, ProgressUpdate
from tests.support.api import ROWS, Api, build_api, live_server, running_api
from tests.support.polling import wait_until


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def record_losses(api: Api, claim: jobs.Claim, losses: list[float]) -> None:
    updates = [MetricUpdate(step=i, epoch=i / 2, loss=loss) for i, loss in enumerate(losses, 1)]
    jobs.record(api.database, claim, "w", updates)


def test_a_job_is_accepted_with_every_default_resolved_and_wakes_a_worker(api: Api) -> None:
    dataset = api.upload()
    answer = api.client.post("/jobs", json={"base_model": "tiny", "dataset": dataset["id"]})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "validating"
    assert job["spec"]["lora"]["alpha"] == 32
    assert api.queue.woken == ["light"]
    assert api.client.get(f"/jobs/{job['id']}").json() == job


def test_the_same_key_and_body_give_the_same_job_and_another_body_a_conflict(api: Api) -> None:
    body = {"base_model": "tiny", "rows": ROWS}
    headers = {"Idempotency-Key": "key 1"}
    first = api.client.post("/jobs", json=body, headers=headers)
    again = api.client.post("/jobs", json=body, headers=headers)
    other = api.client.post("/jobs", json={**body, "priority": 1}, headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert api.queue.woken == ["light"]
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")
    assert len(api.client.get("/jobs").json()["data"]) == 1


def test_racing_requests_with_one_key_make_one_job(tmp_path: Path) -> None:
    api = build_api(tmp_path)
    body = {"base_model": "tiny", "rows": ROWS}
    with live_server(api) as url, ThreadPoolExecutor(8) as pool, httpx2.Client() as client:
        answers = list(
            pool.map(
                lambda _: client.post(f"{url}/jobs", json=body, headers={"Idempotency-Key": "k"}),
                range(8),
            )
        )
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert len(client.get(f"{url}/jobs").json()["data"]) == 1


def test_jobs_are_listed_newest_first_and_filtered(api: Api) -> None:
    ids = [api.submit(adapter=name)["id"] for name in ("a", "b", "a")]
    api.client.post(f"/jobs/{ids[0]}/cancel")

    def listed(**params: str) -> list[str]:
        page = api.client.get("/jobs", params=params).json()
        return [job["id"] for job in page["data"]]

    assert listed() == ids[::-1]
    assert listed(adapter="a") == [ids[2], ids[0]]
    assert listed(status="cancelled") == [ids[0]]
    assert listed(base_model="other") == []


def test_a_waiting_job_is_cancelled_at_once_and_then_deletable(api: Api) -> None:
    job = api.submit()
    refused = api.client.delete(f"/jobs/{job['id']}")
    assert (refused.status_code, refused.json()["code"]) == (409, "job_not_finished")
    cancelled = api.client.post(f"/jobs/{job['id']}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    assert api.client.post(f"/jobs/{job['id']}/cancel").status_code == 202
    assert api.client.delete(f"/jobs/{job['id']}").status_code == 204
    assert api.client.get(f"/jobs/{job['id']}").status_code == 404


def test_a_running_job_is_asked_to_stop(api: Api) -> None:
    job = api.submit()
    claim = api.start_training()
    answer = api.client.post(f"/jobs/{job['id']}/cancel").json()
    assert (answer["status"], answer["stop_requested"]) == ("running", "cancel")
    jobs.cancelled(api.database, claim, "w")
    assert api.client.get(f"/jobs/{job['id']}").json()["status"] == "cancelled"


def test_progress_shows_what_the_worker_reported(api: Api) -> None:
    job = api.submit()
    claim = api.start_training()
    update = ProgressUpdate(stage="train", step=3, total_steps=12, eta_seconds=9.0)
    jobs.record(api.database, claim, "w", [update])
    progress = api.client.get(f"/jobs/{job['id']}").json()["progress"]
    assert (progress["step"], progress["total_steps"], progress["percent"]) == (3, 12, 25.0)


def test_events_come_in_pages(api: Api) -> None:
    job = api.submit()
    api.client.post(f"/jobs/{job['id']}/cancel")
    page = api.client.get(f"/jobs/{job['id']}/events", params={"limit": 1}).json()
    assert [(event["id"], event["type"]) for event in page["data"]] == [(1, "created")]
    after = page["next_cursor"]
    rest = api.client.get(f"/jobs/{job['id']}/events", params={"after": after}).json()
    assert [(event["id"], event["type"]) for event in rest["data"]] == [(2, "cancelled")]
    assert rest["next_cursor"] is None


def test_metrics_come_as_json_pages_and_as_csv(api: Api) -> None:
    job = api.submit()
    record_losses(api, api.start_training(), [2.5, 1.5, 0.5])
    path = f"/jobs/{job['id']}/metrics"
    page = api.client.get(path, params={"limit": 2}).json()
    rest = api.client.get(path, params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert [row["loss"] for row in page["data"] + rest["data"]] == [2.5, 1.5, 0.5]

    by_accept = api.client.get(path, headers={"Accept": "text/csv"})
    by_format = api.client.get(path, params={"format": "csv"})
    assert by_accept.headers["content-type"].startswith("text/csv")
    assert by_accept.text == by_format.text
    rows = list(csv.DictReader(io.StringIO(by_accept.text)))
    assert [(row["step"], row["loss"], row["eval_loss"]) for row in rows] == [
        ("1", "2.5", ""),
        ("2", "1.5", ""),
        ("3", "0.5", ""),
    ]


def test_a_job_without_report_says_so(api: Api) -> None:
    job = api.submit()
    answer = api.client.get(f"/jobs/{job['id']}/report")
    assert (answer.status_code, answer.json()["code"]) == (404, "no_report")


def test_the_worker_is_woken_only_after_the_job_can_be_seen(api: Api) -> None:
    seen: list[list[str]] = []

    class Queue:
        def wake(self, queue: str) -> None:
            seen.append([job["id"] for job in api.client.get("/jobs").json()["data"]])

    object.__setattr__(api.services, "queue", Queue())
    job = api.submit()
    assert seen == [[job["id"]]]


class TestLiveEvents:
    """Streams need a real server: the test client returns whole answers only."""

    @pytest.fixture
    def live(self, tmp_path: Path) -> Iterator[tuple[Api, httpx2.Client]]:
        api = build_api(tmp_path)
        with live_server(api) as url, httpx2.Client(base_url=url, timeout=20) as client:
            yield api, client

    @staticmethod
    def submit(client: httpx2.Client) -> str:
        job = client.post("/jobs", json={"base_model": "tiny", "rows": ROWS})
        return str(job.json()["id"])

    def test_events_arrive_as_they_happen_and_the_stream_ends_with_the_job(
        self, live: tuple[Api, httpx2.Client]
    ) -> None:
        api, client = live
        job_id = self.submit(client)
        claim = api.start_training()
        seen: list[tuple[str, str]] = []
        ended = threading.Event()

        def follow() -> None:
            with client.sse(f"/jobs/{job_id}/events") as stream:
                for event in stream:
                    assert json.loads(event.data)["id"] == int(event.id)
                    seen.append((event.id, event.event))
            ended.set()

        reader = threading.Thread(target=follow)
        reader.start()
        wait_until(lambda: len(seen) == 4, 10, lambda: str(seen))
        assert not ended.is_set()
        jobs.record(api.database, claim, "w", [EventUpdate("checkpoint", {"step": 1})])
        wait_until(lambda: len(seen) == 5, 10, lambda: str(seen))
        jobs.fail(api.database, claim, "w", {"code": "boom", "message": "it broke"})
        reader.join(10)
        assert ended.is_set()
        assert [number for number, _ in seen] == [str(n) for n in range(1, 7)]
        assert [kind for _, kind in seen[-2:]] == ["checkpoint", "failed"]

    def test_a_reader_resumes_where_it_was_cut_off(self, live: tuple[Api, httpx2.Client]) -> None:
        _, client = live
        job_id = self.submit(client)
        client.post(f"/jobs/{job_id}/cancel")
        with client.sse(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "1"}) as stream:
            assert [(event.id, event.event) for event in stream] == [("2", "cancelled")]
        accept = {"Accept": "text/event-stream", "Last-Event-ID": "2"}
        assert client.get(f"/jobs/{job_id}/events", headers=accept).status_code == 204
        accept["Last-Event-ID"] = "two"
        refused = client.get(f"/jobs/{job_id}/events", headers=accept)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_event_id")

    def test_a_quiet_stream_is_kept_alive_and_holds_no_connection(
        self, live: tuple[Api, httpx2.Client], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.streaming.KEEP_ALIVE_SECONDS", 0.05)
        api, client = live
        job_id = self.submit(client)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "1"}
        with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
            first = next(answer.iter_lines())
            assert first.startswith(":")
            pool = api.database.engine.pool
            wait_until(lambda: pool.checkedout() == 0, 5, "a connection is held")  # type: ignore[attr-defined]

    def test_a_stopping_server_ends_its_streams(self, live: tuple[Api, httpx2.Client]) -> None:
        api, client = live
        job_id = self.submit(client)
        with client.sse(f"/jobs/{job_id}/events") as stream:
            events = iter(stream)
            assert next(events).event == "created"
            api.services.stopping.set()
            assert list(events) == []

    def test_the_stream_of_an_unknown_job_is_a_plain_404(
        self, live: tuple[Api, httpx2.Client]
    ) -> None:
        _, client = live
        answer = client.get("/jobs/job-none/events", headers={"Accept": "text/event-stream"})
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
