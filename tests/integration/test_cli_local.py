"""Commands that work on this machine's data, on a real database."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from core.db.session import Database
from service.sample_model import sample_gguf_path
from tests.support.command_line import succeed, tunesmith
from tests.support.factories import add_base_model
from tests.support.tiny_model import make_tiny_model


def test_the_schema_goes_up_and_down(tmp_path: Path) -> None:
    at = ["--data-dir", tmp_path, "--json"]
    assert succeed("db", "current", *at).json["current"] is None
    missing = tunesmith("db", "check", *at)
    assert (missing.code, missing.json["ok"]) == (1, False)
    upgraded = succeed("db", "upgrade", *at).json
    assert upgraded["current"] == upgraded["head"]
    assert succeed("db", "check", *at).json == {"ok": True, **upgraded, "differences": []}
    assert succeed("db", "downgrade", "base", "--yes", *at).json["current"] is None
    unknown = tunesmith("db", "upgrade", "nonsense", *at)
    assert unknown.code == 1
    assert "unknown_revision" in unknown.stderr


def test_a_downgrade_asks_first(tmp_path: Path) -> None:
    succeed("db", "upgrade", "--data-dir", tmp_path)
    refused = tunesmith("db", "downgrade", "base", "--data-dir", tmp_path, stdin="n\n")
    assert refused.code == 1
    current = succeed("db", "current", "--data-dir", tmp_path, "--json").json
    assert current["current"] == current["head"]


def test_a_database_file_that_is_none_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "tunesmith.db").write_bytes(b"no database " * 1000)
    outcome = tunesmith("keys", "list", "--data-dir", tmp_path)
    assert outcome.code == 1
    assert "database_unavailable" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.postgres
def test_a_database_server_is_only_changed_on_request(
    monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    assert succeed("keys", "list", "--json").json == []
    succeed("db", "downgrade", "base", "--yes")
    refused = tunesmith("keys", "list")
    assert refused.code == 1
    assert "schema_outdated" in refused.stderr
    assert succeed("db", "current", "--json").json["current"] is None


def test_keys_are_shown_once_and_can_be_revoked(tmp_path: Path) -> None:
    at = ["--data-dir", tmp_path]
    plain = succeed("keys", "create", "laptop", *at)
    assert plain.stdout.startswith("tsk_")
    made = succeed("keys", "create", "ci", "--project", "robots", "--scope", "read", "--json", *at)
    assert (made.json["project"], made.json["scopes"]) == ("robots", ["read"])

    listed = succeed("keys", "list", "--json", *at)
    assert [key["name"] for key in listed.json] == ["laptop", "ci"]
    for secret in (plain.stdout.strip(), made.json["key"]):
        assert secret not in listed.stdout
    assert succeed("keys", "revoke", made.json["id"], "--json", *at).json["revoked_at"]
    assert made.json["id"] in succeed("keys", "list", *at).stdout

    wrong = tunesmith("keys", "create", "x", "--scope", "everything", *at)
    assert wrong.code == 1
    assert "unknown_scope" in wrong.stderr
    assert tunesmith("keys", "revoke", "key-none", *at).code == 1


def test_models_are_added_once_shown_and_removed(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    at = ["--data-dir", tmp_path / "data"]
    assert "No base models" in succeed("models", "list", *at).stdout
    added = succeed("models", "add", "tiny", tmp_path / "tiny", "--json", *at).json
    assert added["architecture"] == "LlamaForCausalLM"
    assert succeed("models", "add", "tiny", tmp_path / "tiny", "--json", *at).json == added
    assert succeed("models", "list", "--json", *at).json == [added]
    assert added["digest"][:12] in succeed("models", "list", *at).stdout
    shown = succeed("models", "show", "tiny", "--json", *at).json
    assert Path(shown["path"]) == tmp_path / "tiny"
    succeed("models", "rm", "tiny", *at)
    assert (tmp_path / "tiny" / "config.json").exists()
    assert tunesmith("models", "show", "tiny", *at).code == 1


def test_a_model_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = tunesmith("models", "add", "empty", tmp_path / "empty", "--data-dir", tmp_path)
    assert outcome.code == 1
    assert "model_file_missing" in outcome.stderr
    assert "hint: " in outcome.stderr


@pytest.mark.sample_model
def test_the_sample_model_is_found_without_importing_its_package() -> None:
    with sample_gguf_path().open("rb") as file:
        assert file.read(4) == b"GGUF"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--host", "0.0.0.0"], "exposed_without_keys"),
        (["--host", "nowhere.example"], "unknown_host"),
    ],
)
def test_serve_refuses_addresses_that_are_not_safe(
    tmp_path: Path, arguments: list[str], code: str
) -> None:
    outcome = tunesmith("serve", "--data-dir", tmp_path, "--port", 0, *arguments)
    assert (outcome.code, outcome.stdout) == (1, "")
    assert code in outcome.stderr
    assert not (tmp_path / "run" / "serve.json").exists()


def test_serve_says_when_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = tunesmith("serve", "--data-dir", tmp_path, "--port", port)
    assert outcome.code == 1
    assert "port_unavailable" in outcome.stderr


def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNESMITH_LEASE_SECONDS", "soon")
    outcome = tunesmith("models", "list", "--data-dir", tmp_path)
    assert outcome.code == 1
    assert "invalid_settings" in outcome.stderr
    assert "lease_seconds" in outcome.stderr.lower()


def test_doctor_tells_what_is_missing(sqlite_database: Database, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    at = ["--data-dir", tmp_path / "data"]
    succeed("models", "add", "tiny", tmp_path / "tiny", *at)
    add_base_model(sqlite_database, "gone", digest="c" * 64)

    outcome = tunesmith("doctor", "--json", "--deep", *at)
    checks = {check["name"]: check for check in outcome.json["checks"]}
    assert outcome.code == 1
    assert outcome.json["ok"] is False
    assert checks["base model gone"]["status"] == "fail"
    assert checks["base model tiny"]["status"] == "ok"
    assert checks["database"]["status"] == "ok"
    assert checks["model libraries"]["status"] == "ok"
    (engine,) = [check for name, check in checks.items() if name.startswith("engine")]
    assert engine["status"] == "warn"

    config = tmp_path / "tiny" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "changed": True}))
    changed = tunesmith("doctor", "--json", "--deep", *at).json
    assert "base model tiny" in [c["name"] for c in changed["checks"] if c["status"] == "fail"]
