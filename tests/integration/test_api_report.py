"""The before/after report over HTTP, as JSON and as a page, and the release of a version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import jobs
from service.report_view import view_report
from service.routes.jobs import _REPORT_EXAMPLE
from tests.support.api import Api, running_api
from tests.support.factories import publish_artifact

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
HOSTILE = "<script>alert(1)</script>"
SAMPLE = {"prompt": f"أين طردي؟ {HOSTILE}", "reference": "r", "base": "", "adapter": "</style>x"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def _finish(api: Api, tmp_path: Path, report: dict[str, Any], **spec: Any) -> str:
    job = api.submit(adapter="bot", **spec)
    claim = api.start_training()
    published = publish_artifact(api.store, tmp_path / "artifact")
    jobs.succeed(
        api.database,
        claim,
        "w",
        manifest=published.manifest,
        bytes=published.bytes,
        report=report,
        provenance={},
        store=api.store,
    )
    return str(job["id"])


def test_a_report_is_json_unless_a_page_is_asked_for(api: Api, tmp_path: Path) -> None:
    job_id = _finish(api, tmp_path, _REPORT_EXAMPLE | {"samples": [SAMPLE]})
    path = f"/jobs/{job_id}/report"
    assert api.client.get(path).json()["samples"] == [SAMPLE]
    assert api.client.get(path, headers={"Accept": BROWSER}, params={"format": "json"}).json()
    for page in (
        api.client.get(path, headers={"Accept": BROWSER}),
        api.client.get(path, params={"format": "html"}),
    ):
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "bot@1" in page.text
        assert "−1.190  [−1.310, −1.070]" in page.text
    assert api.client.get(path, params={"format": "pdf"}).status_code == 422
    missing = api.client.get("/jobs/job-none/report", headers={"Accept": BROWSER})
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_job")


def test_nothing_in_a_page_can_run_or_load(api: Api, tmp_path: Path) -> None:
    job_id = _finish(api, tmp_path, {"samples": [SAMPLE]})
    page = api.client.get(f"/jobs/{job_id}/report", params={"format": "html"})
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert HOSTILE not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert page.text.count("</style>") == 1
    assert 'dir="auto"' in page.text
    assert "src=" not in page.text
    assert "href=" not in page.text


def test_reports_of_every_age_and_method_are_shown() -> None:
    job: dict[str, Any] = {
        "id": "job-1",
        "adapter": "bot",
        "base_model": "tiny",
        "spec": {"method": {"type": "dpo"}},
        "version": {"name": "bot", "version": 2, "digest": "d", "quarantine": "too bad"},
    }
    old = {"samples": [], "eval_loss": 1.0, "base_eval_loss": 2.0}
    assert [row.change for table in view_report(job, old).tables for row in table.rows] == [
        "−1.000"
    ]
    preferences = {
        "pairs": 9,
        "accuracy": {"mean": 0.9, "low": 0.8, "high": 1.0},
        "margin": {"mean": 1.0, "low": -0.5, "high": 2.0},
        "confidence": 0.95,
        "resamples": 2000,
    }
    (table,) = view_report(job, {"preferences": preferences}).tables
    assert [(row.adapter, row.mood) for row in table.rows] == [("90.0%", "good"), ("+1.000", "")]
    outcome = view_report(job, {}).outcome
    assert (outcome.mood, outcome.lines) == ("bad", ["too bad"])


def test_a_quarantined_version_is_released_over_http(api: Api, tmp_path: Path) -> None:
    spec = {
        "promote": "if_better",
        "data": {"validation_fraction": 0.5},
        "evaluation": {"max_forgetting": 0.1},
    }
    verdict = {"better": False, "compared_with": "base", "reasons": ["too bad"]}
    job_id = _finish(api, tmp_path, {"verdict": verdict}, **spec)
    job = api.client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["version"]["quarantine"]) == ("succeeded", "too bad")
    alias = "/adapters/bot/aliases/latest"
    refused = api.client.put(alias, json={"version": 1})
    assert (refused.status_code, refused.json()["code"]) == (409, "version_quarantined")
    released = api.client.post("/adapters/bot/versions/1/release")
    assert (released.status_code, released.json()["quarantine"]) == (200, None)
    assert api.client.put(alias, json={"version": 1}).json()["latest"] == 1
    unknown = api.client.post("/adapters/bot/versions/9/release")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_version")


@pytest.mark.parametrize(
    ("data", "evaluation", "accepted"),
    [
        ({}, {}, False),
        ({"validation_fraction": 0.5}, {}, False),
        ({}, {"max_forgetting": 0.1}, False),
        ({"validation_fraction": 0.5}, {"max_forgetting": 0.1}, True),
    ],
)
def test_promotion_by_outcome_needs_evidence(
    api: Api, data: dict[str, Any], evaluation: dict[str, Any], accepted: bool
) -> None:
    spec = {"promote": "if_better", "data": data, "evaluation": evaluation}
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(20)]
    answer = api.client.post("/jobs", json={"base_model": "tiny", "rows": rows, **spec})
    if accepted:
        assert answer.status_code == 202
    else:
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["field"]) == (
            422,
            "promotion_needs_evidence",
            "promote",
        )
