"""Webhooks over HTTP and from the command line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import webhooks
from core.config import Settings
from core.db.session import Database
from tests.support.api import Api, running_api
from tests.support.command_line import live_api, succeed, tunesmith
from tests.support.fake_engine import FakeEngine
from tests.support.receiver import Receiver, receiver, status

PUBLIC_URL = "https://example.com/hook"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def create(api: Api, url: str = PUBLIC_URL, **body: Any) -> dict[str, Any]:
    answer = api.client.post("/webhooks", json={"url": url, **body})
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/webhooks/{answer.json()['id']}"
    return dict(answer.json())


def test_a_webhook_lives_from_creation_to_deletion(api: Api) -> None:
    created = create(api, events=["job.failed", "job.succeeded"])
    secret = created.pop("secret")
    assert secret.startswith("whsec_")
    assert (created["url"], created["enabled"]) == (PUBLIC_URL, True)
    assert created["events"] == ["job.succeeded", "job.failed"]
    path = f"/webhooks/{created['id']}"
    assert api.client.get(path).json() == created
    assert api.client.get("/webhooks").json() == {"data": [created], "next_cursor": None}
    assert secret not in api.client.get("/webhooks").text

    rotated = api.client.post(f"{path}/rotate-secret").json()
    assert rotated.pop("secret") not in ("", secret)
    assert rotated == created

    changed = api.client.patch(path, json={"url": "https://example.org/", "enabled": False})
    assert changed.json() == created | {"url": "https://example.org/", "enabled": False}
    assert api.client.patch(path, json={}).json() == changed.json()
    assert api.client.patch(path, json={"events": ["job.paused"]}).json()["events"] == [
        "job.paused"
    ]

    assert api.client.delete(path).status_code == 204
    assert api.client.get(path).status_code == 404
    assert api.client.delete(path).json()["code"] == "unknown_webhook"
    assert create(api)["events"] == list(webhooks.EVENTS)


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({"url": "http://example.com/"}, "invalid_webhook_url", "url"),
        ({"url": "https://user:pw@example.com/"}, "invalid_webhook_url", "url"),
        ({"url": "https://example.com:25/"}, "invalid_webhook_url", "url"),
        ({"url": "https://127.0.0.1/"}, "webhook_address_refused", "url"),
        ({"url": "https://localhost/"}, "webhook_address_refused", "url"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "webhook_address_refused", "url"),
        ({"url": PUBLIC_URL, "events": ["job.exploded"]}, "unknown_event", "events"),
        ({"url": PUBLIC_URL, "events": []}, "unknown_event", "events"),
        ({"url": PUBLIC_URL, "event": ["job.failed"]}, "unknown_field", "event"),
        ({}, "invalid_request", "url"),
    ],
)
def test_what_is_wrong_with_a_webhook_is_named(
    api: Api, body: dict[str, Any], code: str, field: str
) -> None:
    answer = api.client.post("/webhooks", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.json()["code"], answer.json()["field"]) == (code, field)
    path = f"/webhooks/{create(api)['id']}"
    if "url" in body and set(body) <= {"url", "events"}:
        assert api.client.patch(path, json=body).json()["code"] == code
    assert api.client.get(path).json()["url"] == PUBLIC_URL


@pytest.mark.parametrize("url", ["\x00", "https://\ud800.com/", "https://" + "a" * 5000, "/", "💥"])
def test_no_url_breaks_the_service(api: Api, url: str) -> None:
    import json

    answer = api.client.post(
        "/webhooks",
        content=json.dumps({"url": url}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (400, 422), answer.text


def test_a_project_has_at_most_twenty_webhooks(api: Api) -> None:
    for _ in range(webhooks.MAX_WEBHOOKS):
        create(api)
    answer = api.client.post("/webhooks", json={"url": PUBLIC_URL})
    assert (answer.status_code, answer.json()["code"]) == (409, "too_many_webhooks")


def test_deliveries_come_in_pages_newest_first(api: Api) -> None:
    path = f"/webhooks/{create(api)['id']}"
    written = [api.client.post(f"{path}/test").json() for _ in range(5)]
    assert {row["event"] for row in written} == {"webhook.test"}
    found: list[str] = []
    cursor = None
    while True:
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = api.client.get(f"{path}/deliveries", params=params).json()
        found += [row["id"] for row in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == [row["id"] for row in written][::-1]
    first = api.client.get(f"{path}/deliveries").json()["data"][-1]
    assert (first["status"], first["attempts"], first["response_status"]) == ("pending", 0, None)
    assert first["next_attempt_at"] is not None
    assert first["payload"]["data"] == {"webhook_id": path.rsplit("/", 1)[-1]}
    answer = api.client.get(f"{path}/deliveries", params={"cursor": "💥"})
    assert answer.json()["code"] == "invalid_cursor"

    answer = api.client.post(f"{path}/deliveries/{found[0]}/replay")
    assert (answer.status_code, answer.json()["id"]) == (202, found[0])
    missing = api.client.post(f"{path}/deliveries/msg-nothing/replay")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_delivery")
    api.client.patch(path, json={"enabled": False})
    for refused in (f"{path}/test", f"{path}/deliveries/{found[0]}/replay"):
        answer = api.client.post(refused)
        assert (answer.status_code, answer.json()["code"]) == (409, "webhook_disabled")
    rows = api.client.get(f"{path}/deliveries").json()["data"]
    assert {row["status"] for row in rows} == {"dead"}


def test_another_projects_webhook_is_as_good_as_missing(tmp_path: Path) -> None:
    with running_api(tmp_path, auth="keys") as api:
        owner, stranger = api.add_key("owner", "train"), api.add_key("stranger", "train")
        created = api.client.post("/webhooks", json={"url": PUBLIC_URL}, headers=owner).json()
        other = api.client.post("/webhooks", json={"url": PUBLIC_URL}, headers=stranger).json()
        path, delivery = f"/webhooks/{created['id']}", "msg-1"
        delivery = api.client.post(f"{path}/test", headers=owner).json()["id"]
        calls = [
            ("GET", path),
            ("PATCH", path),
            ("DELETE", path),
            ("POST", f"{path}/rotate-secret"),
            ("POST", f"{path}/test"),
            ("GET", f"{path}/deliveries"),
            ("POST", f"{path}/deliveries/{delivery}/replay"),
        ]
        for method, called in calls:
            body = {"json": {"enabled": False}} if method == "PATCH" else {}
            answer = api.client.request(method, called, headers=stranger, **body)
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_webhook"), called
            missing = api.client.request(
                method, called.replace(created["id"], "webhook-no"), headers=stranger, **body
            )
            assert (
                missing.json()["detail"].replace("webhook-no", created["id"])
                == (answer.json()["detail"])
            )
        # Not through a webhook of one's own either.
        answer = api.client.post(
            f"/webhooks/{other['id']}/deliveries/{delivery}/replay", headers=stranger
        )
        assert answer.json()["code"] == "unknown_delivery"
        assert api.client.get("/webhooks", headers=stranger).json()["data"] == [
            {name: value for name, value in other.items() if name != "secret"}
        ]
        assert api.client.get(path, headers=owner).json()["enabled"] is True


def test_addresses_are_for_keys_that_may_change_things(tmp_path: Path) -> None:
    """A URL is often a secret itself, so looking is not for `read` either."""
    with running_api(tmp_path, auth="keys") as api:
        for scope in ("read", "generate"):
            key = api.add_key("owner", scope)
            for method in ("GET", "POST"):
                answer = api.client.request(
                    method, "/webhooks", headers=key, json={"url": PUBLIC_URL}
                )
                assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")
        assert api.client.get("/webhooks").status_code == 401


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def test_the_command_line_does_all_of_it(
    settings: Settings,
    sqlite_database: Database,
    hook: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings.model_copy(update={"webhook_allow_private": True})
    never = threading.Event()
    with live_api(settings, FakeEngine()) as url:
        monkeypatch.setenv("TUNESMITH_URL", url)
        outcome = succeed("webhooks", "create", hook.url, "--event", "job.failed")
        secret = outcome.stdout.strip()
        (row,) = succeed("webhooks", "list", "--json").json
        assert row["id"] in outcome.stderr
        assert "only time" in outcome.stderr
        assert hook.url in succeed("webhooks", "list").stdout

        hook.answer = status(500)
        sent = succeed("webhooks", "test", row["id"], "--json").json
        webhooks.deliver_due(sqlite_database, settings, never)
        shown = succeed("webhooks", "deliveries", row["id"]).stdout
        assert "HTTP 500" in shown
        assert sent["id"] in shown
        hook.answer = status(204)
        assert "pending" in succeed("webhooks", "replay", row["id"], sent["id"]).stdout
        webhooks.deliver_due(sqlite_database, settings, never)
        (delivered,) = succeed("webhooks", "deliveries", row["id"], "--json").json
        assert delivered["status"] == "delivered"
        assert hook.received[-1].verify(secret)["type"] == "webhook.test"

        rotated = succeed("webhooks", "rotate", row["id"]).stdout.strip()
        assert rotated.startswith("whsec_")
        assert rotated != secret
        changed = succeed(
            "webhooks", "set", row["id"], "--disable", "--event", "job.paused", "--json"
        ).json
        assert (changed["enabled"], changed["events"]) == (False, ["job.paused"])
        assert "job.paused" in succeed("webhooks", "set", row["id"], "--enable").stdout
        assert "removed" in succeed("webhooks", "rm", row["id"]).stdout
        assert "No webhooks" in succeed("webhooks", "list").stdout
        refused = tunesmith("webhooks", "rm", row["id"])
        assert refused.code == 1
        assert "unknown_webhook" in refused.stderr
