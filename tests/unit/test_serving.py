"""What must hold before a service starts to listen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core import auth
from core.config import Settings
from core.db.session import Database
from core.errors import InvalidInput, Unavailable
from service.serving import check_exposure, forget_state, is_loopback, url_of, write_state
from service.supervisor import service_processes


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(settings: Settings, host: str) -> None:
    assert is_loopback(host)
    check_exposure(settings, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_other_addresses_need_authentication(settings: Settings, host: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_exposure(settings, host)
    assert caught.value.code == "exposed_without_keys"
    assert "TUNESMITH_AUTH=keys" in str(caught.value.hint)


def test_other_addresses_need_a_key_that_is_not_revoked(
    settings: Settings, sqlite_database: Database
) -> None:
    guarded = settings.model_copy(update={"auth": "keys"})
    with pytest.raises(InvalidInput, match="nobody has a key"):
        check_exposure(guarded, "0.0.0.0")
    with sqlite_database.session(write=True) as session:
        key, _ = auth.create_key(session, "default", "first", ["read"])
    check_exposure(guarded, "0.0.0.0")
    with sqlite_database.session(write=True) as session:
        auth.revoke_key(session, key.id)
    with pytest.raises(InvalidInput, match="nobody has a key"):
        check_exposure(guarded, "0.0.0.0")


def test_unreadable_keys_are_not_taken_for_keys(settings: Settings) -> None:
    settings.root.mkdir(parents=True)
    with pytest.raises(Unavailable):
        check_exposure(settings.model_copy(update={"auth": "keys"}), "0.0.0.0")


@pytest.mark.parametrize("host", ["", "example.com", "300.1.1.1", "127.0.0.1:80"])
def test_names_are_no_addresses(settings: Settings, host: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_exposure(settings, host)
    assert caught.value.code == "unknown_host"


def test_urls_of_ipv6_have_brackets() -> None:
    assert url_of("::1", 80) == "http://[::1]:80"
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"


def test_only_the_writer_forgets_the_state(tmp_path: Path) -> None:
    state = tmp_path / "serve.json"
    write_state(state, {"url": "http://127.0.0.1:1", "pid": os.getppid()})
    forget_state(state)
    assert state.exists()
    write_state(state, {"url": "http://127.0.0.1:1", "pid": os.getpid()})
    forget_state(state)
    assert not state.exists()
    forget_state(state)


@pytest.mark.parametrize(
    ("others", "with_local", "expected"),
    [("", False, True), ("vllm+http://gpu:8000", False, False), ("http://gpu:1", True, True)],
)
def test_an_engine_starts_where_it_would_be_asked(
    settings: Settings, others: str, with_local: bool, expected: bool
) -> None:
    urls = f"{others},unix:{settings.engine_socket}" if with_local else others
    chosen = settings.model_copy(update={"engine_urls": urls})
    parts = [part.name for part in service_processes(chosen, host="127.0.0.1", port=8000)]
    assert parts == [*(["engine"] if expected else []), "api", "light-worker", "train-worker"]
