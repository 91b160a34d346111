"""Commands over HTTP, against the real API on a real database; only the engine is a fake."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core import jobs
from core.auth import create_key
from core.config import Settings
from core.db.session import Database
from core.jobs import EventUpdate, MetricUpdate, ProgressUpdate
from core.storage import LocalStore
from service.serving import find_port
from tests.support.command_line import Outcome, live_api, succeed, tunesmith
from tests.support.factories import ROWS, add_base_model, make_artifact, must_claim
from tests.support.fake_engine import FakeEngine
from tests.support.polling import wait_until

LEASE_SECONDS = 30
LINE = json.dumps(
    {
        "step": 3,
        "reason": "it fits",
        "event": "early_stopped",
        "job_id": "job-1",
        "level": "info",
        "timestamp": "2026-11-24T14:02:11.5Z",
    }
)


@pytest.fixture
def url(
    settings: Settings, sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    add_base_model(sqlite_database)
    with live_api(settings, FakeEngine()) as url:
        monkeypatch.setenv("TUNESMITH_URL", url)
        yield url


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"base_model": "tiny", "adapter": "bot"}))
    return path


@pytest.fixture
def finish(sqlite_database: Database, store: LocalStore, tmp_path: Path) -> Callable[[], None]:
    """Do what the workers would do with the one waiting job, without training."""

    def work() -> None:
        claim = must_claim(sqlite_database, "w", "validate", LEASE_SECONDS)
        jobs.validated(sqlite_database, claim, "w", {"rows": 1})
        claim = must_claim(sqlite_database, "w", "train", LEASE_SECONDS)
        updates: list[jobs.Update] = [
            EventUpdate("training_started", {}),
            MetricUpdate(step=1, epoch=0.5, loss=2.5, tokens_per_second=120.0),
            ProgressUpdate("train", 1, 2, 3.0, 20),
        ]
        output = f"{LINE}\nof a library {{}}\n"
        jobs.record(sqlite_database, claim, "w", updates, output=output, max_log_bytes=10**6)
        make_artifact(tmp_path / "artifact")
        published = store.publish_adapter(tmp_path / "artifact")
        jobs.succeed(
            sqlite_database,
            claim,
            "w",
            manifest=published.manifest,
            bytes=published.bytes,
            report={"samples": [{"prompt": "hi", "base": "no", "adapter": "ho"}]},
            provenance={},
            store=store,
        )

    return work


@pytest.mark.usefixtures("url")
def test_datasets_are_uploaded_listed_shown_and_removed(rows_file: Path) -> None:
    assert "No data sets" in succeed("datasets", "list").stdout
    dataset = succeed("datasets", "upload", rows_file, "--json").json
    assert (dataset["rows"], dataset["filename"]) == (1, "rows.jsonl")
    assert succeed("datasets", "list", "--json").json == [dataset]
    assert dataset["id"] in succeed("datasets", "list").stdout
    assert succeed("datasets", "show", dataset["id"], "--json").json == dataset
    assert "messages" in succeed("datasets", "show", dataset["id"]).stdout
    assert succeed("datasets", "rm", dataset["id"], "--json").json["removed"] is True
    gone = tunesmith("datasets", "show", dataset["id"])
    assert (gone.code, gone.stdout) == (1, "")
    assert "unknown_dataset" in gone.stderr


@pytest.mark.usefixtures("url")
def test_a_refused_upload_shows_the_lines(rows_file: Path) -> None:
    with rows_file.open("a") as file:
        file.write('{"messages": []}\n{"nothing": 1}\n')
    outcome = tunesmith("datasets", "upload", rows_file, "--json")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "invalid_dataset" in outcome.stderr
    assert "line 2" in outcome.stderr
    assert "line 3" in outcome.stderr


@pytest.mark.usefixtures("url")
def test_lists_are_read_over_all_pages(rows_file: Path) -> None:
    ids = []
    for number in range(103):
        rows_file.write_text(json.dumps({"prompt": f"{number}", "completion": "x"}) + "\n")
        ids.append(succeed("datasets", "upload", rows_file, "--json").json["id"])
    listed = succeed("datasets", "list", "--limit", 102, "--json").json
    assert [dataset["id"] for dataset in listed] == ids[:0:-1]


@pytest.mark.usefixtures("url")
def test_a_job_is_submitted_from_a_file_with_changes(rows_file: Path, spec_file: Path) -> None:
    job = succeed(
        "jobs", "submit", spec_file, "--upload", rows_file, "--set", "training.epochs=2", "--json"
    ).json
    assert job["status"] == "validating"
    assert job["spec"]["training"]["epochs"] == 2
    assert job["dataset"] == succeed("datasets", "list", "--json").json[0]["id"]

    spec = spec_file.read_text()
    arguments = ["jobs", "submit", "-", "--dataset", job["dataset"], "--idempotency-key", "k"]
    again = succeed(*arguments, stdin=spec).stdout.strip()
    assert succeed(*arguments, stdin=spec).stdout.strip() == again
    assert [row["id"] for row in succeed("jobs", "list", "--json").json] == [again, job["id"]]
    other = tunesmith(*arguments, "--set", "adapter=other", stdin=spec)
    assert other.code == 1
    assert "idempotency_key_reused" in other.stderr


@pytest.mark.usefixtures("url")
def test_a_spec_with_a_misspelt_field_is_refused_with_a_hint(spec_file: Path) -> None:
    outcome = tunesmith("jobs", "submit", spec_file, "--dataset", "x", "--set", "lora.rank=8")
    assert outcome.code == 1
    assert "lora.rank" in outcome.stderr
    assert "hint: " in outcome.stderr


@pytest.mark.usefixtures("url")
def test_a_waiting_job_is_cancelled_and_removed(rows_file: Path, spec_file: Path) -> None:
    job_id = succeed("jobs", "submit", spec_file, "--upload", rows_file).stdout.strip()
    early = tunesmith("jobs", "rm", job_id)
    assert early.code == 1
    assert succeed("jobs", "cancel", job_id, "--json").json["status"] == "cancelled"
    assert succeed("jobs", "list", "--status", "cancelled", "--json").json[0]["id"] == job_id
    assert "cancelled" in succeed("jobs", "show", job_id).stdout
    waited = tunesmith("jobs", "show", job_id, "--wait")
    assert waited.code == 1
    assert "cancelled" in waited.stderr
    assert "cancelled" in succeed("jobs", "events", job_id, "--follow").stdout
    succeed("jobs", "rm", job_id)
    assert tunesmith("jobs", "show", job_id).code == 1


@pytest.mark.usefixtures("url")
def test_following_a_job_shows_its_progress_and_what_it_made(
    rows_file: Path, spec_file: Path, finish: Callable[[], None]
) -> None:
    submitted = succeed("jobs", "submit", spec_file, "--upload", rows_file, "--json").json
    outcomes: list[Outcome] = []
    watcher = threading.Thread(
        target=lambda: outcomes.append(tunesmith("jobs", "show", submitted["id"], "--follow"))
    )
    watcher.start()
    finish()
    watcher.join(30)
    (outcome,) = outcomes
    assert outcome.code == 0, outcome
    assert outcome.stdout.startswith("bot@1  ")
    assert "succeeded  step" in outcome.stderr
    assert "loss 2.500" in outcome.stderr

    whole = succeed("jobs", "show", submitted["id"], "--wait", "--json")
    assert whole.json["version"]["version"] == 1
    events = succeed("jobs", "events", submitted["id"], "--json").stdout.splitlines()
    ids = [json.loads(line)["id"] for line in events]
    assert ids == list(range(1, len(ids) + 1))
    followed = succeed("jobs", "events", submitted["id"], "--follow", "--json").stdout
    assert [json.loads(line)["id"] for line in followed.splitlines()] == ids
    later = succeed("jobs", "events", submitted["id"], "--after", 1, "--json").stdout
    assert [json.loads(line)["id"] for line in later.splitlines()] == ids[1:]

    metrics = succeed("jobs", "metrics", submitted["id"], "--json").json
    assert [(row["step"], row["loss"]) for row in metrics] == [(1, 2.5)]
    assert "2.5" in succeed("jobs", "metrics", submitted["id"]).stdout
    log = succeed("jobs", "logs", submitted["id"]).stdout.splitlines()
    assert log[0].endswith("  info     early_stopped  step=3 reason=it fits")
    assert log[1:] == ["of a library {}"]
    assert succeed("jobs", "logs", submitted["id"], "-n", 1).stdout == "of a library {}\n"
    none = succeed("jobs", "logs", submitted["id"], "--attempt", 9)
    assert (none.stdout, none.stderr) == ("", "No lines.\n")
    logged = succeed("jobs", "logs", submitted["id"], "--follow", "--json").stdout
    assert [json.loads(line)["text"] for line in logged.splitlines()] == [LINE, "of a library {}"]
    report = succeed("jobs", "report", submitted["id"], "--json").json
    assert report["samples"][0]["adapter"] == "ho"
    shown = succeed("jobs", "report", submitted["id"]).stdout
    assert "Published and promoted to latest" in shown
    assert "│ ho " in shown
    page = rows_file.with_name("report.html")
    succeed("jobs", "report", submitted["id"], "--html", page)
    assert page.read_text("utf-8").startswith("<!doctype html>")


def trained(spec_file: Path, rows_file: Path, finish: Callable[[], None]) -> dict[str, Any]:
    job_id = succeed("jobs", "submit", spec_file, "--upload", rows_file).stdout.strip()
    finish()
    return dict(succeed("jobs", "show", job_id, "--json").json)


@pytest.mark.usefixtures("url")
def test_adapters_are_shown_downloaded_imported_moved_and_removed(
    tmp_path: Path, rows_file: Path, spec_file: Path, finish: Callable[[], None]
) -> None:
    assert "No adapters" in succeed("adapters", "list").stdout
    digest = trained(spec_file, rows_file, finish)["version"]["digest"]
    assert [row["name"] for row in succeed("adapters", "list", "--json").json] == ["bot"]
    assert "latest=1" in succeed("adapters", "list").stdout
    assert succeed("adapters", "show", "bot", "--json").json["versions"][0]["digest"] == digest
    assert digest[:12] in succeed("adapters", "show", "bot").stdout
    assert digest in succeed("adapters", "show", "bot", "--version", 1).stdout

    succeed("adapters", "alias", "bot", "stable", 1)
    aliases = succeed("adapters", "show", "bot", "--json").json["aliases"]
    assert aliases == {"latest": 1, "stable": 1}
    unknown = tunesmith("adapters", "alias", "bot", "stable", 9)
    assert unknown.code == 1

    archive = tmp_path / "bot.tar.gz"
    saved = succeed("adapters", "download", "bot", "-o", archive, "--json").json
    assert saved == {
        "name": "bot", "version": 1, "path": str(archive), "bytes": archive.stat().st_size
    }  # fmt: skip
    assert "target_exists" in tunesmith("adapters", "download", "bot", "-o", archive).stderr
    succeed("adapters", "download", "bot", "--version", 1, "-o", archive, "--force")
    assert list(tmp_path.glob("*.part")) == []

    refused = tunesmith("adapters", "rm", "bot")
    assert refused.code == 1
    succeed("adapters", "rm", "bot", "--force")
    assert succeed("adapters", "list", "--json").json == []


@pytest.mark.usefixtures("url")
def test_answers_come_whole_or_piece_by_piece(
    rows_file: Path, spec_file: Path, finish: Callable[[], None]
) -> None:
    digest = trained(spec_file, rows_file, finish)["version"]["digest"]
    base = succeed("generate", "hello there")
    assert base.stdout == "base hello there\n"
    assert "base model tiny" in base.stderr
    tuned = succeed("generate", "hello there", "--adapter", "bot", "--json").json
    assert tuned["text"] == f"{digest[:8]} hello there"
    streamed = succeed("generate", "hello there", "--adapter", "bot:latest", "--stream")
    assert streamed.stdout == tuned["text"] + "\n"
    assert "bot@1" in streamed.stderr

    conversation = json.dumps({"messages": [{"role": "user", "content": "from stdin"}]})
    assert "from stdin" in succeed("generate", "--messages", "-", stdin=conversation).stdout
    assert "raw" in succeed("generate", "raw", "--raw").stdout

    nobody = tunesmith("generate", "x", "--adapter", "nobody", "--stream")
    assert (nobody.code, nobody.stdout) == (1, "")
    assert "unknown_adapter" in nobody.stderr


@pytest.mark.usefixtures("url")
def test_an_answer_that_breaks_off_is_a_failure() -> None:
    outcome = tunesmith("generate", "FAIL", "--raw", "--stream")
    assert outcome.code == 1
    assert "error: " in outcome.stderr


def test_a_service_with_keys_wants_one(settings: Settings, sqlite_database: Database) -> None:
    with sqlite_database.session(write=True) as session:
        _, secret = create_key(session, "default", "test", ["read"])
    guarded = settings.model_copy(update={"auth": "keys"})
    with live_api(guarded, FakeEngine()) as url:
        without = tunesmith("jobs", "list", "--url", url)
        assert without.code == 1
        assert "TUNESMITH_API_KEY" in without.stderr
        assert succeed("jobs", "list", "--url", url, "--key", secret, "--json").json == []


def test_where_nobody_listens_the_command_says_how_to_start() -> None:
    outcome = tunesmith("jobs", "list", "--url", f"http://127.0.0.1:{find_port('127.0.0.1', 0)}")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "tunesmith serve" in outcome.stderr


@pytest.mark.parametrize("valid", [True, False])
def test_a_validation_shows_its_report_and_fails_for_an_invalid_one(
    url: str, spec_file: Path, rows_file: Path, sqlite_database: Database, valid: bool
) -> None:
    error = {"line": 7, "field": None, "code": "row_too_long", "message": "too long"}
    report = {
        "valid": valid, "format": "messages", "rows_read": 9, "rows": 8, "dropped": {"max_rows": 1},
        "error_count": 0 if valid else 1, "errors": [] if valid else [error], "too_long": None,
        "duplicates": 1, "duplicate_rows": [{"line": 5, "same_as_line": 2}],
        "training_rows": 8, "validation_rows": 0, "overlap": 0, "overlap_rows": [],
        "tokens": {"total": 80, "min": 5, "mean": 10.0, "p50": 9, "p95": 20, "max": 20},
        "trained_tokens": 40, "steps": 6, "tokens_per_epoch": 80, "total_tokens": 240,
        "histogram": [{"from_tokens": 1, "to_tokens": 16, "rows": 8, "rows_by_trained": 8}],
        "sample": {
            "line": 1, "text": "ask: answer", "spans": [[5, 11]],
            "rejected_text": "ask: nothing", "rejected_spans": [[5, 12]],
        },
        "warnings": [{"code": "few_rows", "message": "8 rows to train on are few", "lines": []}],
    }  # fmt: skip

    def work() -> None:
        def claim() -> bool:
            found = jobs.claim(
                sqlite_database, worker_id="w", stage="validate", lease_seconds=LEASE_SECONDS
            )
            if found is not None:
                jobs.validation_done(sqlite_database, found, "w", report)
            return found is not None

        wait_until(claim, 10, "nothing to validate")

    worker = threading.Thread(target=work)
    worker.start()
    outcome = tunesmith("jobs", "validate", spec_file, "--upload", rows_file)
    worker.join()
    assert outcome.code == (0 if valid else 1)
    shown = outcome.stdout
    assert ("row_too_long" in shown) is not valid
    for text in ("1 (lines 5 = 2)", "max_rows", "ask: ⟦answer⟧", "few_rows", "unknown: no train"):
        assert text in shown
    assert "ask: ⟦nothing⟧" in shown
    assert succeed("jobs", "list", "--json").json == []
