"""Pinned aliases: loaded at once, followed when they move, sent again to an engine that forgot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import Conflict, Unavailable
from service import pins
from tests.support.api import Api, adapter_files, pack, running_api
from tests.support.polling import wait_until


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


def publish(api: Api, seed: int) -> str:
    version = api.import_adapter("bot", pack(adapter_files(seed=seed))).json()
    return str(version["digest"])


def kept(api: Api) -> list[str]:
    status = asyncio.run(api.engine.status())
    return [adapter.digest for adapter in status.adapters if adapter.kept]


def test_a_pinned_alias_is_loaded_and_told(api: Api) -> None:
    digest = publish(api, 1)
    answer = api.client.put("/adapters/bot/aliases/latest/pin")
    assert answer.status_code == 200, answer.text
    assert answer.json()["pinned"] == ["latest"]
    assert kept(api) == [digest]
    (adapter,) = api.client.get("/engine").json()["adapters"]
    assert (adapter["digest"], adapter["kept"], adapter["tier"]) == (digest, True, "memory")
    answer = api.client.delete("/adapters/bot/aliases/latest/pin")
    assert answer.json()["pinned"] == []
    assert kept(api) == []


def test_the_pin_follows_the_alias_and_outlives_the_engine(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "SECONDS_BETWEEN_LOOKS", 0.05)
    first = publish(api, 1)
    assert api.client.put("/adapters/bot/aliases/latest/pin").status_code == 200
    second = publish(api, 2)
    assert second != first
    wait_until(lambda: kept(api) == [second], 20, "the pin does not follow")
    api.engine._resident.clear()
    wait_until(lambda: kept(api) == [second], 20, "the pin is not sent again")
    assert api.client.get("/adapters/bot").json()["pinned"] == ["latest"]


def test_what_cannot_be_loaded_is_not_pinned(api: Api) -> None:
    digest = publish(api, 1)
    api.engine.refusals[digest] = Conflict("full", code="kept_adapters_full")
    refused = api.client.put("/adapters/bot/aliases/latest/pin")
    assert (refused.status_code, refused.json()["code"]) == (409, "kept_adapters_full")
    api.engine.refusals.clear()
    api.engine.unavailable = Unavailable("gone", code="engine_unavailable")
    assert api.client.put("/adapters/bot/aliases/latest/pin").status_code == 503
    assert api.client.get("/adapters/bot").json()["pinned"] == []
    for method in ("put", "delete"):
        unknown = api.client.request(method, "/adapters/bot/aliases/never/pin")
        assert unknown.status_code == 404, unknown.text
