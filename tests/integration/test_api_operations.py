from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core import jobs
from core.errors import Unavailable
from tests.support.api import Api, adapter_files, build_api, pack, running_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def add_workers(api: Api) -> None:
    for queue in ("train", "light"):
        jobs.register_worker(api.database, f"{queue}-1", queue, "host", 1, None)


def failing(answer: Any) -> dict[str, str]:
    assert answer.status_code == 503
    body = answer.json()
    assert body["ready"] is False
    return {name: check["reason"] for name, check in body["checks"].items() if not check["ok"]}


def samples(api: Api) -> dict[tuple[str, tuple[str, ...]], float]:
    answer = api.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_a_complete_service_is_ready(api: Api) -> None:
    add_workers(api)
    answer = api.client.get("/readyz")
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["checks"]) == {
        "database", "storage", "broker", "engine", "train_worker", "light_worker"
    }  # fmt: skip


def test_missing_parts_are_named_with_their_reason(api: Api) -> None:
    assert set(failing(api.client.get("/readyz"))) == {"train_worker", "light_worker"}
    add_workers(api)
    jobs.forget_worker(api.database, "light-1")
    api.engine.unavailable = Unavailable("the engine is starting", code="engine_starting")
    reasons = failing(api.client.get("/readyz"))
    assert set(reasons) == {"engine", "light_worker"}
    assert reasons["engine"] == "the engine is starting"


def test_a_worker_that_fell_silent_does_not_count(api: Api) -> None:
    add_workers(api)
    with api.database.session(write=True) as session:
        from sqlalchemy import update

        from core.db.models import Worker

        silent = {"heartbeat_epoch": Worker.heartbeat_epoch - 100}
        session.execute(update(Worker).where(Worker.queue == "train").values(**silent))
    assert "s old" in failing(api.client.get("/readyz"))["train_worker"]


def test_an_old_schema_and_a_lost_database_are_told_apart(tmp_path: Path) -> None:
    api = build_api(tmp_path)
    database = api.settings.root / "tunesmith.db"
    api.database.close()
    database.write_bytes(b"")
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    with running_with(api) as client:
        assert "tunesmith db upgrade" in failing(client.get("/readyz"))["database"]
        answer = client.get("/jobs")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert client.get("/healthz").status_code == 200


def test_an_unreachable_database_is_a_503_everywhere(tmp_path: Path) -> None:
    settings = {"database_url": "postgresql://127.0.0.1:9/none?connect_timeout=1"}
    api = build_api(tmp_path, models=(), **settings)
    with running_with(api) as client:
        assert "cannot be reached" in failing(client.get("/readyz"))["database"]
        body = {"base_model": "tiny", "rows": [{"prompt": "a", "completion": "b"}]}
        answer = client.post("/jobs", json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        metrics = client.get("/metrics")
        assert metrics.status_code == 200
        assert "tunesmith_database_up 0.0" in metrics.text


def running_with(api: Api) -> Any:
    """Return the entered client of an API whose database is not usable."""
    from starlette.testclient import TestClient

    return TestClient(api.app, base_url="http://localhost", raise_server_exceptions=False)


def test_metrics_count_requests_jobs_tokens_and_the_engine(api: Api) -> None:
    before = samples(api)
    api.submit()
    api.client.post(f"/jobs/{api.submit()['id']}/cancel")
    api.import_adapter("bot", pack(adapter_files()))
    api.client.post("/generate?adapter=bot", json={"prompt": "one two"})
    api.client.get("/nowhere/at/all")
    api.client.request("BREW", "/jobs")
    after = samples(api)

    def grown(name: str, *labels: str) -> float:
        return after.get((name, labels), 0) - before.get((name, labels), 0)

    assert grown("tunesmith_http_requests_total", "POST", "/jobs", "202") == 2
    assert grown("tunesmith_http_requests_total", "POST", "/jobs/{job_id}/cancel", "202") == 1
    assert grown("tunesmith_http_requests_total", "GET", "unmatched", "404") == 1
    assert grown("tunesmith_http_requests_total", "other", "/jobs", "405") == 1
    assert grown("tunesmith_http_request_duration_seconds_count", "POST", "/jobs") == 2
    assert grown("tunesmith_prompt_tokens_total") == 2
    assert grown("tunesmith_generated_tokens_total") == 3
    assert after["tunesmith_jobs", ("validating",)] == 1
    assert after["tunesmith_jobs_ended_total", ("cancelled",)] == 1
    assert 0 <= after["tunesmith_oldest_job_age_seconds", ("validating",)] < 60
    assert after["tunesmith_workers", ("train",)] == 0
    assert after["tunesmith_webhook_deliveries", ("dead",)] == 0
    assert after["tunesmith_engine_up", ()] == 1
    assert after["tunesmith_engine_resident_adapters", ()] == 1
    assert after["tunesmith_engine_adapter_loads_total", ()] == 1
    api.engine.unavailable = Unavailable("gone")
    assert samples(api)["tunesmith_engine_up", ()] == 0


def test_the_engines_state_is_shown_or_its_absence(api: Api) -> None:
    assert api.client.get("/engine").json()["adapters"] == []
    api.engine.unavailable = Unavailable("gone", code="engine_unavailable")
    answer = api.client.get("/engine")
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")


def test_base_models_are_listed_without_paths_of_this_machine(api: Api) -> None:
    (model,) = api.client.get("/models").json()["data"]
    assert model == api.client.get("/models/tiny").json()
    assert model["digest"] == api.base_digests["tiny"]
    assert str(api.settings.root.parent) not in str(model)
    missing = api.client.get("/models/absent")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_base_model")


def test_the_openapi_document_describes_every_route_and_its_problems(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert set(schemas["Problem"]["required"]) >= {"type", "title", "status", "detail", "code"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            assert operation["tags"], (method, path)
            for status, response in operation["responses"].items():
                if status >= "400" and path != "/readyz":
                    assert "application/problem+json" in response["content"], (method, path, status)
    references = set(find_references(document))
    assert references <= {f"#/components/schemas/{name}" for name in schemas}
    for page in ("/docs", "/redoc"):
        assert api.client.get(page).status_code == 404


def find_references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for member in value:
            yield from find_references(member)


def test_the_api_starts_without_a_model_library() -> None:
    program = (
        "import sys, tempfile, pathlib\n"
        "from core.config import Settings\n"
        "from service.app import create_app\n"
        "app = create_app(Settings(data_dir=pathlib.Path(tempfile.mkdtemp())))\n"
        "app.openapi()\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'accelerate', 'numpy'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert finished.stdout.strip() == "[]"
