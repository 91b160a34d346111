"""`POST /jobs/validate` with a real light worker and validator behind the API."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from core.db.models import BaseModel, JobEvent
from core.queue import NullQueue
from core.storage import LocalStore
from tests.support.api import Api, running_api
from tests.support.children import environment
from tests.support.polling import wait_until
from tests.support.tiny_model import make_tokenizer
from worker.child import ChildProcess
from worker.runner import Runner
from worker.validation import VALIDATOR_ARGV, ValidateStage

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(12)]
KILLED = "import os, sys\nsys.stdin.buffer.read(1)\nos.kill(os.getpid(), 9)"
KILLED_ONCE = """
import os, pathlib, sys
marker = pathlib.Path(sys.argv[1])
if not marker.exists():
    marker.touch()
    sys.stdin.buffer.read(1)
    os.kill(os.getpid(), 9)
from core.data.process import main
main()
"""
Start = Callable[..., ChildProcess]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, idle_poll_seconds=0.1, max_attempts=2) as api:
        with api.database.session() as session:
            model = session.get(BaseModel, "tiny")
            assert model is not None
            make_tokenizer().save_pretrained(model.path)
        yield api


@pytest.fixture
def start(api: Api) -> Iterator[Start]:
    runners: list[Runner] = []

    def light_worker(argv: tuple[str, ...] = VALIDATOR_ARGV) -> ChildProcess:
        child = ChildProcess(
            argv, log_path=api.settings.root / "logs" / "child.log", environment=environment()
        )
        stage = ValidateStage(api.settings, LocalStore(api.settings.root), NullQueue())
        runners.append(Runner("light", stage, api.settings, api.database, child))
        runners[-1].start()
        return child

    yield light_worker
    for runner in runners:
        runner.stop()
    assert all(runner.join(30) for runner in runners)


def validate(api: Api, wait_seconds: float = 10, **spec: Any) -> Any:
    return api.client.post(
        "/jobs/validate",
        params={"wait_seconds": wait_seconds},
        json={"base_model": "tiny", "rows": ROWS, **spec},
    )


def test_the_answer_is_the_report_and_nothing_is_left(api: Api, start: Start) -> None:
    start()
    answer = validate(api)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["status"], found["valid"], found["report"]["rows"]) == ("succeeded", True, 12)
    assert api.client.get(answer.headers["Location"]).json() == found

    bad = [*ROWS, {"prompt": "a"}, {"prompt": "b", "completion": "1" * 300}]
    answer = validate(api, rows=bad, training={"max_length": 64})
    assert answer.status_code == 200
    found = answer.json()
    assert (found["status"], found["valid"]) == ("succeeded", False)
    errors = [(error["line"], error["code"]) for error in found["report"]["errors"]]
    assert errors == [(13, "missing_field"), (14, "row_too_long")]

    answer = validate(api, rows=None, dataset=api.upload(ROWS)["id"])
    assert answer.json()["valid"]
    assert api.client.get("/jobs").json()["data"] == []
    assert len(api.client.get("/datasets").json()["data"]) == len(api.blobs()) == 1


def test_a_long_one_is_answered_with_202_and_can_be_polled(api: Api, start: Start) -> None:
    answer = validate(api, wait_seconds=0)
    assert answer.status_code == 202
    assert answer.json()["status"] == "validating"
    assert api.queue.woken == ["light"]
    path = answer.headers["Location"]
    start()
    wait_until(lambda: api.client.get(path).json()["valid"], 20, lambda: api.client.get(path).text)


def test_a_killed_validator_is_replaced(api: Api, start: Start, tmp_path: Path) -> None:
    start((sys.executable, "-c", KILLED_ONCE, str(tmp_path / "killed")))
    found = validate(api).json()
    assert (found["status"], found["valid"]) == ("succeeded", True)
    with api.database.session() as session:
        events = list(session.scalars(select(JobEvent.type).order_by(JobEvent.sequence)))
    assert events == ["validation_started", "requeued", "validation_started", "validated"]


def test_a_validator_that_dies_again_and_again_is_given_up(api: Api, start: Start) -> None:
    start((sys.executable, "-c", KILLED))
    answer = validate(api)
    found = answer.json()
    assert (answer.status_code, found["status"], found["valid"]) == (200, "failed", None)
    assert found["error"]["code"] == "attempts_exhausted"


def test_an_impossible_spec_is_refused_and_an_unknown_one_not_found(api: Api) -> None:
    for spec, code in (
        ({"base_model": "other"}, "unknown_base_model"),
        ({"rows": None, "dataset": "file-none"}, "unknown_dataset"),
        ({"lora": {"target_modules": ["nothing"]}}, "unknown_target_module"),
        ({"lora": {"r": 0}}, "invalid_request"),
    ):
        answer = validate(api, **spec)
        assert answer.status_code == 422
        assert answer.json()["code"] == code
    answer = api.client.get("/jobs/validations/validation-none")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_validation")


def test_a_file_of_foreign_columns_needs_a_mapping(api: Api, start: Start) -> None:
    start()
    rows = "".join(f"question {n},answer {n}\n" for n in range(12))
    upload = {"file": ("rows.csv", f"ask,say\n{rows}".encode())}
    dataset = api.client.post("/datasets", files=upload).json()
    spec = {"rows": None, "dataset": dataset["id"]}
    without = validate(api, **spec).json()
    assert [error["code"] for error in without["report"]["errors"]] == ["unknown_format"]
    columns = {"prompt": "ask", "completion": "reply"}
    wrong = validate(api, **spec, data={"columns": columns}).json()["report"]["errors"]
    assert [(error["code"], error["field"]) for error in wrong] == [
        ("unknown_column", "data.columns.completion")
    ]
    assert "'ask', 'say'" in wrong[0]["message"]
    data = {"columns": columns | {"completion": "say"}, "validation_dataset": dataset["id"]}
    report = validate(api, **spec, data=data).json()["report"]
    assert (report["valid"], report["training_rows"], report["overlap"]) == (True, 12, 12)
    assert [(one["role"], one["rows"]) for one in report["sources"]] == [
        ("training", 12), ("validation", 12),
    ]  # fmt: skip
