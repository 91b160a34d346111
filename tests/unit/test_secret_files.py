from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.config import Settings
from core.errors import InvalidInput


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("postgresql://tunesmith:pa$$ word@db/tunesmith\n")
    return path


@pytest.mark.parametrize(
    ("variable", "field"),
    [
        ("DATABASE_URL_FILE", "database_url"),
        ("TUNESMITH_DATABASE_URL_FILE", "database_url"),
        ("BROKER_URL_FILE", "broker_url"),
        ("TUNESMITH_ENGINE_SECRET_FILE", "engine_secret"),
    ],
)
def test_a_secret_comes_from_the_named_file_without_its_newline(
    monkeypatch: pytest.MonkeyPatch, secret: Path, variable: str, field: str
) -> None:
    monkeypatch.setenv(variable, str(secret))
    value = getattr(Settings(), field)
    plain = value.get_secret_value() if field == "engine_secret" else value
    assert plain == "postgresql://tunesmith:pa$$ word@db/tunesmith"


def test_an_empty_variable_stands_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch, secret: Path
) -> None:
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", "")
    monkeypatch.setenv("DATABASE_URL_FILE", str(secret))
    monkeypatch.setenv("BROKER_URL", "redis://r")
    monkeypatch.setenv("BROKER_URL_FILE", "")
    settings = Settings()
    assert settings.database_url.endswith("@db/tunesmith")
    assert settings.broker_url == "redis://r"


def test_an_argument_is_stronger_than_a_file(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", str(secret))
    assert Settings(database_url="sqlite://").database_url == "sqlite://"


@pytest.mark.parametrize("other", ["DATABASE_URL", "TUNESMITH_DATABASE_URL"])
def test_a_value_and_a_file_are_one_too_many(
    monkeypatch: pytest.MonkeyPatch, secret: Path, other: str
) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", str(secret))
    monkeypatch.setenv(other, "postgresql://elsewhere")
    with pytest.raises(InvalidInput) as caught:
        Settings()
    assert caught.value.code == "setting_given_twice"
    assert caught.value.field == "DATABASE_URL_FILE"
    assert other in caught.value.message
    assert "elsewhere" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "secret_file_unreadable"),
        (b"\xff\xfe", "secret_file_unreadable"),
        (b"x" * 70_000, "secret_file_unreadable"),
        (b"\n", "secret_file_empty"),
    ],
)
def test_a_file_that_holds_no_secret_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, code: str
) -> None:
    path = tmp_path / "engine-secret"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("TUNESMITH_ENGINE_SECRET_FILE", str(path))
    with pytest.raises(InvalidInput) as caught:
        Settings()
    assert caught.value.code == code
    assert caught.value.field == "TUNESMITH_ENGINE_SECRET_FILE"
    assert str(path) in caught.value.message


def test_children_get_the_values_and_read_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secret: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", str(secret))
    settings = Settings(data_dir=tmp_path)
    environment = {**os.environ, **settings.environment()}
    secret.unlink()
    program = "from core.config import Settings; print(Settings().database_url)"
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == settings.database_url


def test_only_secrets_are_read_from_files(monkeypatch: pytest.MonkeyPatch, secret: Path) -> None:
    monkeypatch.setenv("TUNESMITH_LOG_LEVEL_FILE", str(secret))
    assert Settings().log_level == "INFO"


def test_the_command_line_says_which_file_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.support.command_line import tunesmith

    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "gone"))
    outcome = tunesmith("db", "current")
    assert outcome.code == 1
    assert "secret_file_unreadable" in outcome.stderr
    assert str(tmp_path / "gone") in outcome.stderr
    assert "Traceback" not in outcome.stderr
