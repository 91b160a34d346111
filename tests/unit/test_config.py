from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.config import Settings


def test_everything_lives_in_the_data_directory_by_default(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.resolved_database_url == f"sqlite:///{tmp_path / 'tunesmith.db'}"
    assert settings.engine_addresses == [f"unix:{settings.engine_socket}"]


def test_a_socket_path_fits_the_system_limit(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    path = Settings(data_dir=deep).engine_socket
    assert len(os.fsencode(path)) < 100
    assert path == Settings(data_dir=deep).engine_socket


def test_the_shared_urls_are_read_without_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://db/x")
    monkeypatch.setenv("ENGINE_URLS", "http://a:1, http://b:2")
    settings = Settings()
    assert settings.resolved_database_url == "postgresql+psycopg://db/x"
    assert settings.engine_addresses == ["http://a:1", "http://b:2"]


def test_a_child_process_gets_the_same_settings(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path, lease_seconds=7.5, engine_secret="s3cret", engine_urls="http://a:1"
    )
    program = "from core.config import Settings; print(Settings().model_dump_json())"
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **settings.environment()},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    received = Settings.model_validate_json(output)
    assert received.root == settings.root
    assert received.lease_seconds == 7.5
    assert received.engine_addresses == ["http://a:1"]
