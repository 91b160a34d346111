"""Rows of the Hugging Face Hub, from a small hub on loopback to the data set of a job."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.data.hub_rows import HubRows, fetch
from core.data.ingest import read_rows
from core.db.models import BaseModel
from core.errors import InvalidInput, TunesmithError, Unavailable
from core.queue import NullQueue
from core.storage import LocalStore
from tests.support.api import Api, running_api
from tests.support.children import environment
from tests.support.hub import COMMIT, serve_hub
from tests.support.polling import wait_until
from tests.support.tiny_model import make_tokenizer
from worker.child import ChildProcess
from worker.runner import Runner
from worker.validation import VALIDATOR_ARGV, ValidateStage

REPOSITORY = "acme/pairs"
REFERENCE = f"hf:{REPOSITORY}@main"
ROWS = [{"question": f"question {n}", "answer": f"answer {n}"} for n in range(200)]
FILES = {
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "validation.jsonl": (json.dumps(ROWS[3]) + "\n").encode(),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serve_hub(REPOSITORY, FILES) as endpoint:
        yield endpoint


def closed_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def wanted(split: str = "train", **members: Any) -> HubRows:
    limits = {"max_rows": 1000, "max_bytes": 10**6}
    return HubRows.model_validate(
        {"repository": REPOSITORY, "revision": "main", "split": split} | limits | members
    )


def test_a_slice_of_a_split_is_fetched_and_nothing_else_stays(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as in the validator
    target = tmp_path / "rows.parquet"
    assert fetch(wanted("train[10:12]"), target, lambda: None) == COMMIT
    assert [row for _, row in read_rows(target)] == ROWS[10:12]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rows.parquet", "rows.parquet.log",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"split": "nope"}, "unknown_split"),
        ({"repository": "acme/other"}, "hub_dataset_not_found"),
        ({"max_rows": 199}, "too_many_rows"),
    ],
)
def test_what_cannot_be_fetched_has_a_code(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, Any], code: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    with pytest.raises(InvalidInput) as caught:
        fetch(wanted(**members), tmp_path / "rows", lambda: None)
    assert caught.value.code == code


def test_no_code_of_a_repository_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    script = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n".encode()
    with serve_hub(REPOSITORY, FILES | {"pairs.py": script}) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(InvalidInput, match="scripts are no longer supported") as caught:
            fetch(wanted(), tmp_path / "rows", lambda: None)
    assert caught.value.code == "hub_dataset_unreadable"
    assert not marker.exists()


def test_without_a_network_the_hub_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
    with pytest.raises(Unavailable) as caught:
        fetch(wanted(), tmp_path / "rows", lambda: None)
    assert caught.value.code == "hub_unreachable"


def test_a_stop_ends_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())

    def stop() -> None:
        raise TunesmithError("stop")

    with pytest.raises(TunesmithError, match="stop"):
        fetch(wanted(), tmp_path / "rows", stop)
    assert not (tmp_path / "rows.hub").exists()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, idle_poll_seconds=0.1, hub_datasets="acme/*") as api:
        with api.database.session() as session:
            model = session.get(BaseModel, "tiny")
            assert model is not None
            make_tokenizer().save_pretrained(model.path)
        yield api


def run_light_worker(api: Api, endpoint: str) -> Runner:
    child = ChildProcess(
        VALIDATOR_ARGV,
        log_path=api.settings.root / "logs" / "child.log",
        environment=environment() | {"HF_ENDPOINT": endpoint},
    )
    stage = ValidateStage(api.settings, LocalStore(api.settings.root), NullQueue())
    runner = Runner("light", stage, api.settings, api.database, child)
    runner.start()
    return runner


def test_a_job_fails_without_a_network_and_retried_with_one_keeps_its_rows(
    hub: str, api: Api
) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    spec = {
        "base_model": "tiny",
        "dataset": REFERENCE,
        "split": "train[:5%]",
        "data": {"columns": columns, "validation_dataset": REFERENCE},
    }
    answer = api.client.post("/jobs", json=spec)
    assert answer.status_code == 202, answer.text
    assert answer.json()["dataset"] == REFERENCE
    job_id = answer.json()["id"]

    def job() -> Any:
        return api.client.get(f"/jobs/{job_id}").json()

    runner = run_light_worker(api, closed_endpoint())
    try:
        wait_until(lambda: job()["status"] == "failed", 60, lambda: str(job()))
    finally:
        runner.stop()
        assert runner.join(30)
    assert job()["error"]["code"] == "hub_unreachable"
    assert api.client.get("/datasets").json()["data"] == []

    runner = run_light_worker(api, hub)
    try:
        assert api.client.post(f"/jobs/{job_id}/retry").status_code == 202
        wait_until(lambda: job()["status"] not in ("validating", "failed"), 90, lambda: str(job()))
    finally:
        runner.stop()
        assert runner.join(30)
    assert job()["status"] == "queued", job()
    events = api.client.get(f"/jobs/{job_id}/events").json()["data"]
    report = next(event["data"] for event in events if event["type"] == "validated")
    assert (report["training_rows"], report["validation_rows"], report["overlap"]) == (10, 1, 1)
    assert [(one["dataset"], one["rows"]) for one in report["sources"]] == [
        (f"{REFERENCE} train[:5%]", 10), (f"{REFERENCE} validation", 1),
    ]  # fmt: skip
    kept = api.client.get("/datasets").json()["data"]
    assert [(one["rows"], one["format"], one["report"]["commit"]) for one in kept] == [
        (1, "unknown", COMMIT), (10, "unknown", COMMIT),
    ]  # fmt: skip
    assert job()["dataset"] == kept[1]["id"]
    assert api.client.delete(f"/datasets/{kept[0]['id']}").status_code == 409


def test_the_api_tells_why_a_data_set_of_the_hub_is_refused(api: Api) -> None:
    answer = api.client.post("/jobs", json={"base_model": "tiny", "dataset": "hf:b/c@main"})
    assert (answer.status_code, answer.json()["code"]) == (403, "hub_dataset_not_allowed")
    answer = api.client.post("/jobs/validate", json={"base_model": "tiny", "dataset": "hf:b@x"})
    assert answer.status_code == 422
