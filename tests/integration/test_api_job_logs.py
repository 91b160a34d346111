from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from core import jobs
from tests.support.api import ROWS, Api, build_api, live_server, running_api
from tests.support.polling import wait_until


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def write(api: Api, claim: jobs.Claim, *lines: str, max_bytes: int = 10**6) -> None:
    output = "".join(f"{line}\n" for line in lines)
    jobs.record(api.database, claim, "w", [], output=output, max_log_bytes=max_bytes)


def test_the_last_lines_come_as_json_and_all_as_text(api: Api) -> None:
    path = f"/jobs/{api.submit()['id']}/logs"
    claim = api.start_training()
    empty = {"data": [], "next_cursor": None, "dropped_bytes": 0, "complete": False}
    assert api.client.get(path).json() == empty
    assert api.client.get(path, params={"format": "text"}).text == ""
    lines = [f"line {number} ä" for number in range(1500)]
    write(api, claim, *lines)

    page = api.client.get(path).json()
    assert [line["text"] for line in page["data"]] == lines[-200:]
    assert {line["attempt"] for line in page["data"]} == {claim.attempt}
    first = api.client.get(path, params={"after": 0, "limit": 2}).json()
    assert [line["text"] for line in first["data"]] == lines[:2]
    after = first["next_cursor"]
    assert after == str(first["data"][-1]["id"])
    rest = api.client.get(path, params={"after": after, "limit": 10_000}).json()
    assert [line["text"] for line in rest["data"]] == lines[2:]
    assert rest["next_cursor"] is None
    assert api.client.get(path, params={"attempt": 9}).json()["data"] == []

    whole = api.client.get(path, headers={"Accept": "text/plain"})
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert whole.text.splitlines() == lines
    tail = api.client.get(path, params={"format": "text", "limit": 3})
    assert tail.text.splitlines() == lines[-3:]
    behind = api.client.get(path, params={"format": "text", "after": after})
    assert behind.text.splitlines() == lines[2:]
    assert api.client.get(path, headers={"Accept": "*/*"}).json() == page


def test_text_says_what_is_missing_and_json_when_nothing_follows(api: Api) -> None:
    path = f"/jobs/{api.submit()['id']}/logs"
    claim = api.start_training()
    for number in range(10):
        write(api, claim, f"{number:0>99}", max_bytes=500)
    jobs.cancelled(api.database, claim, "w")
    text = api.client.get(path, params={"format": "text"}).text.splitlines()
    assert text == ["… 500 bytes before this are no longer kept"] + [
        f"{n:0>99}" for n in range(5, 10)
    ]
    page = api.client.get(path).json()
    assert (page["dropped_bytes"], page["complete"], len(page["data"])) == (500, True, 5)


@pytest.mark.parametrize(
    "params",
    ["after=-1", "after=x", "limit=0", "limit=10001", "attempt=-1", "format=xml", "after=1e99"],
)
def test_what_cannot_be_meant_is_refused(api: Api, params: str) -> None:
    answer = api.client.get(f"/jobs/{api.submit()['id']}/logs?{params}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("accept", ["application/json", "text/plain", "text/event-stream"])
def test_an_unknown_job_is_a_404_in_every_form(api: Api, accept: str) -> None:
    answer = api.client.get("/jobs/job-none/logs", headers={"Accept": accept})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")


class TestLive:
    @pytest.fixture
    def live(self, tmp_path: Path) -> Iterator[tuple[Api, httpx2.Client]]:
        api = build_api(tmp_path)
        with live_server(api) as url, httpx2.Client(base_url=url, timeout=20) as client:
            yield api, client

    @staticmethod
    def begin(api: Api, client: httpx2.Client) -> jobs.Claim:
        client.post("/jobs", json={"base_model": "tiny", "rows": ROWS})
        return api.start_training()

    def test_lines_arrive_as_they_are_written_and_the_stream_ends_with_the_job(
        self, live: tuple[Api, httpx2.Client]
    ) -> None:
        api, client = live
        claim = self.begin(api, client)
        write(api, claim, *(f"old {number}" for number in range(10)))
        seen: list[str] = []
        ended = threading.Event()

        def follow() -> None:
            with client.sse(f"/jobs/{claim.job_id}/logs", params={"limit": 2}) as stream:
                for event in stream:
                    line = json.loads(event.data)
                    assert (event.event, event.id) == ("line", str(line["id"]))
                    seen.append(line["text"])
            ended.set()

        reader = threading.Thread(target=follow)
        reader.start()
        wait_until(lambda: len(seen) == 2, 10, lambda: str(seen))
        write(api, claim, *(f"new {number}" for number in range(1100)))
        wait_until(lambda: len(seen) == 1102, 10, lambda: str(len(seen)))
        assert not ended.is_set()
        write(api, claim, "last")
        jobs.fail(api.database, claim, "w", {"code": "boom", "message": "it broke"})
        reader.join(10)
        assert ended.is_set()
        assert seen == ["old 8", "old 9", *(f"new {number}" for number in range(1100)), "last"]

    def test_a_reader_goes_on_where_it_was_cut_off(self, live: tuple[Api, httpx2.Client]) -> None:
        api, client = live
        claim = self.begin(api, client)
        write(api, claim, "one", "two", "three")
        jobs.fail(api.database, claim, "w", {"code": "boom", "message": "it broke"})
        path = f"/jobs/{claim.job_id}/logs"
        with client.sse(path, headers={"Last-Event-ID": "4"}) as stream:
            lines = [(event.id, json.loads(event.data)["text"]) for event in stream]
        assert lines == [("8", "two"), ("14", "three")]
        accept = {"Accept": "text/event-stream", "Last-Event-ID": "14"}
        assert client.get(path, headers=accept).status_code == 204
        for wrong in ("two", "-1", "9" * 19):
            refused = client.get(path, headers=accept | {"Last-Event-ID": wrong})
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_event_id")

    def test_a_stream_ends_when_its_job_is_deleted(self, live: tuple[Api, httpx2.Client]) -> None:
        api, client = live
        claim = self.begin(api, client)
        write(api, claim, "one")
        with client.sse(f"/jobs/{claim.job_id}/logs") as stream:
            lines = iter(stream)
            assert json.loads(next(lines).data)["text"] == "one"
            jobs.cancelled(api.database, claim, "w")
            assert client.delete(f"/jobs/{claim.job_id}").status_code == 204
            assert list(lines) == []
