"""The whole path over HTTP on a tiny model: upload, train, watch, generate, download, stop."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import psutil
import pytest

from tests.support.preferences import make_pairs
from tests.support.service import RunningService, chat_rows

SPEC: dict[str, Any] = {
    "base_model": "tiny",
    "adapter": "parrot",
    "lora": {"r": 8},
    "training": {"max_steps": 30, "learning_rate": 0.01, "seed": 3},
    "data": {"validation_fraction": 0.2},
    "evaluation": {"samples": 1, "max_new_tokens": 8},
}
QUESTION = {
    "messages": [{"role": "user", "content": "What is the code of item 3?"}],
    "max_new_tokens": 12,
}


@pytest.fixture(scope="module")
def finished_job(tiny_service: RunningService) -> dict[str, Any]:
    dataset = tiny_service.upload(chat_rows(20))
    job = tiny_service.submit({**SPEC, "dataset": dataset}, key="first-light")
    assert job["status"] == "validating"
    again = tiny_service.client.post(
        "/jobs", json={**SPEC, "dataset": dataset}, headers={"Idempotency-Key": "first-light"}
    )
    assert again.json()["id"] == job["id"]
    return tiny_service.finish(job["id"])


def test_the_job_succeeds_and_says_what_it_made(finished_job: dict[str, Any]) -> None:
    assert finished_job["status"] == "succeeded", finished_job
    assert finished_job["error"] is None
    assert finished_job["version"]["name"] == "parrot"
    assert finished_job["version"]["version"] == 1
    assert finished_job["progress"]["step"] == finished_job["progress"]["total_steps"] == 30
    assert finished_job["spec"]["training"]["batch_size"] == 2


def test_its_events_have_no_gap_and_its_metrics_every_step(
    tiny_service: RunningService, finished_job: dict[str, Any]
) -> None:
    events: list[dict[str, Any]] = []
    with tiny_service.client.sse(f"/jobs/{finished_job['id']}/events") as stream:
        events = [{"id": int(event.id), **json.loads(event.data)} for event in stream]
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "succeeded"

    metrics = tiny_service.client.get(
        f"/jobs/{finished_job['id']}/metrics", params={"limit": 1000}
    ).json()["data"]
    losses = {row["step"]: row["loss"] for row in metrics if row["loss"] is not None}
    assert sorted(losses) == list(range(1, 31))
    assert losses[30] < losses[1] / 2
    assert any(row["eval_loss"] is not None for row in metrics)


def test_the_report_shows_answers_before_and_after(
    tiny_service: RunningService, finished_job: dict[str, Any]
) -> None:
    report = tiny_service.client.get(f"/jobs/{finished_job['id']}/report").json()
    (sample,) = report["samples"]
    assert sample["base"] != sample["adapter"]


def test_the_adapter_answers_and_the_base_is_untouched(
    tiny_service: RunningService, finished_job: dict[str, Any]
) -> None:
    body = {"base_model": "tiny", **QUESTION}
    base = tiny_service.client.post("/generate", json=body).json()
    tuned = tiny_service.client.post("/generate", params={"adapter": "parrot"}, json=body).json()
    again = tiny_service.client.post("/generate", json=body).json()
    assert base["adapter"] is None
    assert tuned["adapter"]["digest"] == finished_job["version"]["digest"]
    assert tuned["adapter"]["version"] == 1
    assert tuned["precision"] in {"float32", "fp16"}
    assert tuned["usage"]["prompt_tokens"] == base["usage"]["prompt_tokens"]
    assert base["text"] == again["text"] != tuned["text"]


def test_a_stream_says_the_same_as_the_whole_answer(
    tiny_service: RunningService, finished_job: dict[str, Any]
) -> None:
    whole = tiny_service.client.post("/generate?adapter=parrot@1", json=QUESTION).json()
    text, last = "", None
    with tiny_service.client.sse(
        "/generate?adapter=parrot:latest", method="POST", json={**QUESTION, "stream": True}
    ) as stream:
        for event in stream:
            if event.event == "delta":
                text += event.json()["text"]  # type: ignore[index]
            last = event
    assert last is not None
    assert last.event == "done"
    assert text == whole["text"]
    assert json.loads(last.data)["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("reference", "base_model", "status", "code"),
    [
        ("nobody", None, 404, "unknown_adapter"),
        ("parrot@99", None, 404, "unknown_adapter"),
        ("Not A Name", None, 422, "invalid_adapter_reference"),
        ("parrot", "other", 409, "base_model_mismatch"),
    ],
)
def test_nothing_is_silently_answered_by_the_base(
    tiny_service: RunningService,
    finished_job: dict[str, Any],
    reference: str,
    base_model: str | None,
    status: int,
    code: str,
) -> None:
    body = {**QUESTION, **({"base_model": base_model} if base_model else {})}
    answer = tiny_service.client.post("/generate", params={"adapter": reference}, json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_downloaded_adapter_can_be_imported_under_another_name(
    tiny_service: RunningService, finished_job: dict[str, Any]
) -> None:
    archive = tiny_service.client.get("/adapters/parrot/versions/1/download").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = {name.rsplit("/", 1)[-1] for name in tar.getnames()}
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= names
    imported = tiny_service.client.post(
        "/adapters/import",
        params={"name": "parrot-copy", "base_model": "tiny"},
        files={"file": ("parrot.tar.gz", archive, "application/gzip")},
    )
    assert imported.status_code == 201, imported.text
    original = tiny_service.client.post("/generate?adapter=parrot", json=QUESTION).json()
    copy = tiny_service.client.post("/generate?adapter=parrot-copy", json=QUESTION).json()
    assert copy["text"] == original["text"]


def test_preference_pairs_go_on_from_a_published_adapter(
    tiny_service: RunningService, finished_job: dict[str, Any]
) -> None:
    spec = {
        "base_model": "tiny",
        "adapter": "chooser",
        "rows": make_pairs(12),
        "method": {"type": "dpo", "beta": 0.2},
        "continue_from": "parrot@1",
        "lora": {"r": 8},
        "training": {"max_steps": 12, "learning_rate": 0.01},
        "data": {"validation_fraction": 0.25},
        "evaluation": {"samples": 1, "max_new_tokens": 4},
    }
    job = tiny_service.finish(tiny_service.submit(spec)["id"])
    assert job["status"] == "succeeded", job
    report = tiny_service.client.get(f"/jobs/{job['id']}/report").json()
    assert report["preferences"]["accuracy"]["mean"] == 1
    assert report["preferences"]["margin"]["low"] > 0
    metrics = tiny_service.client.get(f"/jobs/{job['id']}/metrics").json()["data"]
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert metrics[-1]["eval_margin"] == pytest.approx(report["preferences"]["margin"]["mean"])
    answers = [
        tiny_service.client.post("/generate", params={"adapter": name}, json=QUESTION)
        for name in ("parrot", "chooser")
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["text"] != answers[1].json()["text"]


def test_cancelling_a_running_job_ends_it_and_publishes_nothing(
    tiny_service: RunningService,
) -> None:
    spec = {
        "base_model": "tiny",
        "adapter": "never",
        "rows": chat_rows(8),
        "training": {"max_steps": 100_000},
    }
    job = tiny_service.submit(spec)
    tiny_service.wait_for(job["id"], lambda seen: seen["progress"]["step"] > 2, 60)
    answer = tiny_service.client.post(f"/jobs/{job['id']}/cancel")
    assert answer.status_code == 202, answer.text
    assert tiny_service.finish(job["id"], 30)["status"] == "cancelled"
    assert tiny_service.client.get("/adapters/never").status_code == 404


def test_rows_that_cannot_be_trained_fail_in_validation_with_their_line(
    tiny_service: RunningService,
) -> None:
    rows = chat_rows(3)
    rows[1]["messages"][1]["content"] = "far too long " * 200
    job = tiny_service.submit(
        {"base_model": "tiny", "rows": rows, "training": {"max_length": 64, "max_steps": 1}}
    )
    ended = tiny_service.finish(job["id"])
    assert ended["status"] == "failed"
    assert ended["error"]["code"] == "invalid_dataset"
    assert [finding["line"] for finding in ended["error"]["errors"]] == [2]


def test_operators_see_the_service(tiny_service: RunningService) -> None:
    assert tiny_service.client.get("/healthz").status_code == 200
    ready = tiny_service.client.get("/readyz")
    assert ready.status_code == 200, ready.text
    metrics = tiny_service.client.get("/metrics").text
    assert "tunesmith_jobs{" in metrics
    roles = tiny_service.processes()
    assert {"supervisor", "api", "engine", "train", "light"} <= set(roles)


def test_one_interrupt_stops_every_process(tiny_service: RunningService) -> None:
    pids = [process.pid for process in tiny_service.processes().values()]
    assert tiny_service.stop() == 0
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
