from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import auth, jobs
from core.logging import configure
from tests.support.api import ROWS, Api, adapter_files, pack, running_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, auth="keys") as running:
        yield running


@pytest.fixture
def open_api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, allowed_origins="https://app.example") as running:
        yield running


READS = ["/datasets", "/jobs", "/adapters", "/models", "/models/tiny", "/engine", "/workers"]
WRITES: list[tuple[str, str, str]] = [
    ("POST", "/datasets", "train"),
    ("DELETE", "/datasets/x", "train"),
    ("POST", "/jobs", "train"),
    ("POST", "/jobs/x/cancel", "train"),
    ("DELETE", "/jobs/x", "train"),
    ("POST", "/adapters/import?name=a&base_model=tiny", "train"),
    ("PUT", "/adapters/x/aliases/prod", "train"),
    ("DELETE", "/adapters/x/aliases/prod", "train"),
    ("DELETE", "/adapters/x", "train"),
    ("DELETE", "/adapters/x/versions/1", "train"),
    ("POST", "/generate", "generate"),
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/jobs": {"base_model": "tiny", "rows": ROWS},
    "/generate": {"prompt": "a"},
    "/adapters/x/aliases/prod": {"version": 1},
}


@pytest.mark.parametrize("path", [*READS, "/metrics"])
def test_reads_need_a_key_with_any_scope(api: Api, path: str) -> None:
    answer = api.client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    for scope in auth.SCOPES:
        assert api.client.get(path, headers=api.add_key("p", scope)).status_code == 200


@pytest.mark.parametrize(("method", "path", "scope"), WRITES)
def test_writes_need_their_scope(api: Api, method: str, path: str, scope: str) -> None:
    body = BODIES.get(path)
    for granted in auth.SCOPES:
        headers = api.add_key("p", granted)
        answer = api.client.request(method, path, headers=headers, json=body)
        if granted in (scope, "admin"):
            assert answer.status_code not in (401, 403), answer.text
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")


@pytest.mark.parametrize(
    "header", ["tsk_x", "Bearer", "Bearer tsk_" + "a" * 43, "Bearer \xff", "Basic dXNlcg=="]
)
def test_what_is_no_valid_key_is_unauthorized(api: Api, header: str) -> None:
    answer = api.client.get("/jobs", headers=[(b"authorization", header.encode("latin-1"))])
    assert answer.status_code == 401


def test_a_revoked_key_is_out_at_once(api: Api) -> None:
    headers = api.add_key("p", "read")
    assert api.client.get("/jobs", headers=headers).status_code == 200
    with api.database.session(write=True) as session:
        (key,) = auth.list_keys(session)
        auth.revoke_key(session, key.id)
    assert api.client.get("/jobs", headers=headers).status_code == 401


def test_probes_need_no_key(api: Api) -> None:
    assert api.client.get("/healthz").status_code == 200
    assert "checks" in api.client.get("/readyz").json()


def test_what_another_project_owns_cannot_be_told_from_what_does_not_exist(api: Api) -> None:
    owner, stranger = api.add_key("a", "admin"), api.add_key("b", "admin")
    dataset = api.upload(headers=owner)["id"]
    spec = {"base_model": "tiny", "dataset": dataset, "adapter": "bot"}
    job = api.client.post("/jobs", json=spec, headers=owner).json()["id"]
    assert api.import_adapter("bot", pack(adapter_files()), headers=owner).status_code == 201

    calls: list[tuple[str, str, dict[str, Any] | None]] = [
        ("GET", "/datasets/{dataset}", None),
        ("GET", "/datasets/{dataset}/rows", None),
        ("DELETE", "/datasets/{dataset}", None),
        ("POST", "/jobs", {**spec, "dataset": "{dataset}"}),
        ("GET", "/jobs/{job}", None),
        ("GET", "/jobs/{job}/events", None),
        ("GET", "/jobs/{job}/logs", None),
        ("GET", "/jobs/{job}/logs?format=text", None),
        ("GET", "/jobs/{job}/metrics", None),
        ("GET", "/jobs/{job}/metrics?format=csv", None),
        ("GET", "/jobs/{job}/report", None),
        ("POST", "/jobs/{job}/cancel", None),
        ("DELETE", "/jobs/{job}", None),
        ("GET", "/adapters/{adapter}", None),
        ("GET", "/adapters/{adapter}/versions", None),
        ("GET", "/adapters/{adapter}/versions/1", None),
        ("GET", "/adapters/{adapter}/versions/1/download", None),
        ("PUT", "/adapters/{adapter}/aliases/latest", {"version": 1}),
        ("DELETE", "/adapters/{adapter}/aliases/prod", None),
        ("DELETE", "/adapters/{adapter}/versions/1?force=true", None),
        ("DELETE", "/adapters/{adapter}?force=true", None),
        ("POST", "/generate?adapter={adapter}", {"prompt": "a"}),
    ]

    def ask(method: str, path: str, body: Any, **names: str) -> tuple[int, dict[str, Any]]:
        content = json.dumps(body) if body is not None else ""
        for key, name in names.items():
            path, content = path.replace(f"{{{key}}}", name), content.replace(f"{{{key}}}", name)
        answer = api.client.request(
            method, path, headers={**stranger, "Content-Type": "application/json"}, content=content
        )
        told = answer.text
        for key, name in names.items():
            told = told.replace(name, f"{{{key}}}")
        return answer.status_code, {**json.loads(told), "request_id": None}

    for method, path, body in calls:
        other = ask(method, path, body, dataset=dataset, job=job, adapter="bot")
        missing = ask(method, path, body, dataset="file-none", job="job-none", adapter="none")
        assert other[0] in (404, 422), (path, other)
        assert other == missing, path

    for path in ("/datasets", "/jobs", "/adapters"):
        assert api.client.get(path, headers=stranger).json()["data"] == []
        assert len(api.client.get(path, headers=owner).json()["data"]) == 1
    assert api.client.get(f"/jobs/{job}", headers=owner).status_code == 200
    assert api.client.post("/generate?adapter=bot", json={"prompt": "a"}, headers=owner).is_success


def test_operators_views_name_only_the_callers_own_objects(api: Api) -> None:
    owner, stranger = api.add_key("a", "train"), api.add_key("b", "train")
    digest = api.import_adapter("bot", pack(adapter_files()), headers=owner).json()["digest"]
    job = api.client.post("/jobs", json=BODIES["/jobs"], headers=owner).json()["id"]
    jobs.register_worker(api.database, "w", "light", "host", 1, job)

    def seen(headers: dict[str, str]) -> tuple[list[tuple[str, list[str]]], str | None, int]:
        engine = api.client.get("/engine", headers=headers).json()
        (worker,) = api.client.get("/workers", headers=headers).json()["data"]
        named = [(adapter["digest"], adapter["names"]) for adapter in engine["adapters"]]
        return named, worker["job_id"], engine["resident"]

    assert seen(owner) == ([(digest, ["bot@1"])], job, 1)
    assert seen(stranger) == ([], None, 1)
    assert seen(api.add_key("c", "admin")) == ([(digest, [])], None, 1)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "[::1]:80", "[::1]"]
)
def test_local_host_names_are_accepted(open_api: Api, host: str) -> None:
    assert open_api.client.get("/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", ""])
def test_foreign_host_names_are_refused(open_api: Api, host: str) -> None:
    answer = open_api.client.get("/jobs", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (403, "host_not_allowed")
    assert open_api.client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({}, True),
        ({"Origin": "http://localhost"}, True),
        ({"Origin": "https://app.example"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://localhost:9999"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-origin"}, True),
    ],
)
def test_web_pages_of_others_cannot_write(
    open_api: Api, headers: dict[str, str], accepted: bool
) -> None:
    answer = open_api.client.post("/jobs", json=BODIES["/jobs"], headers=headers)
    if accepted:
        assert answer.status_code == 202, answer.text
    else:
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_not_allowed")
        assert open_api.client.get("/jobs", headers=headers).status_code == 200


def test_an_allowed_origin_passes_the_browsers_preflight(open_api: Api) -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    answer = open_api.client.options("/jobs", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    headers["Origin"] = "https://evil.example"
    answer = open_api.client.options("/jobs", headers=headers)
    assert "access-control-allow-origin" not in answer.headers


def test_with_keys_neither_host_nor_origin_matters(api: Api) -> None:
    headers = {**api.add_key("p", "train"), "Host": "any.example", "Origin": "http://evil.example"}
    assert api.client.post("/jobs", json=BODIES["/jobs"], headers=headers).status_code == 202


def test_every_answer_carries_its_request_id_and_modest_security_headers(open_api: Api) -> None:
    sane = open_api.client.get("/jobs/none", headers={"X-Request-ID": "abc-1"})
    assert sane.headers["x-request-id"] == sane.json()["request_id"] == "abc-1"
    for bad in ("a b", "x" * 200, "<script>"):
        answer = open_api.client.get("/healthz", headers={"X-Request-ID": bad})
        assert answer.headers["x-request-id"].startswith("req-")
    assert sane.headers["x-content-type-options"] == "nosniff"


def test_the_log_has_one_line_per_request_and_never_what_was_said(
    open_api: Api, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers, level = logging.getLogger().handlers, logging.getLogger().level
    configure(open_api.settings, "api")
    try:
        body = {"prompt": "a s3cret", "messages": "s3cret", "s3cret": "s3cret"}
        open_api.client.post("/generate?adapter=s3cret", json=body)
        open_api.client.post("/generate", json={"prompt": "a s3cret"})
        open_api.client.get("/jobs/s3cret?cursor=s3cret")
    finally:
        logging.getLogger().handlers, logging.getLogger().level = handlers, level
        logging.captureWarnings(False)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["route"], line["status"]) for line in requests] == [
        ("/generate", 422),
        ("/generate", 200),
        ("/jobs/{job_id}", 404),
    ]
    assert "s3cret" not in json.dumps(lines)
