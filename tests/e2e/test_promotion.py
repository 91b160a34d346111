"""Promotion that goes by the outcome, from the upload to the alias, on a tiny model."""

from __future__ import annotations

from typing import Any

from tests.support.judged_rows import judged_rows
from tests.support.service import RunningService

SPEC: dict[str, Any] = {
    "base_model": "tiny",
    "adapter": "judged",
    "promote": "if_better",
    "lora": {"r": 4},
    "training": {"max_steps": 40, "learning_rate": 0.01, "batch_size": 4},
    "evaluation": {"samples": 1, "max_new_tokens": 8},
}


def test_only_a_version_that_is_better_becomes_the_latest(tiny_service: RunningService) -> None:
    client = tiny_service.client
    spec = SPEC | {"data": {"validation_dataset": tiny_service.upload(judged_rows(16, first=100))}}

    good = tiny_service.submit({**spec, "dataset": tiny_service.upload(judged_rows(32))})
    good = tiny_service.finish(good["id"])
    assert good["status"] == "succeeded", good
    assert good["version"]["quarantine"] is None
    assert client.get("/adapters/judged").json()["latest"] == 1

    bad = tiny_service.submit(
        {**spec, "dataset": tiny_service.upload(judged_rows(32, shuffled=True))}
    )
    bad = tiny_service.finish(bad["id"])
    assert bad["status"] == "succeeded", bad
    assert "not clearly below the base's" in bad["version"]["quarantine"]
    assert client.get("/adapters/judged").json()["aliases"] == {"latest": 1}
    events = client.get(f"/jobs/{bad['id']}/events").json()["data"]
    assert [event["type"] for event in events][-2:] == ["quarantined", "succeeded"]
    moved = client.put("/adapters/judged/aliases/latest", json={"version": 2})
    assert (moved.status_code, moved.json()["code"]) == (409, "version_quarantined")

    body = {"messages": [{"role": "user", "content": "100: quick?"}], "max_new_tokens": 4}
    for reference, version in (("judged", 1), ("judged@2", 2)):
        answer = client.post("/generate", params={"adapter": reference}, json=body)
        assert answer.json()["adapter"]["version"] == version, answer.text

    page = client.get(f"/jobs/{bad['id']}/report", params={"format": "html"})
    assert "Quarantined: no alias points at it" in page.text
