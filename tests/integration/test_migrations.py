from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

import migrations
from core.auth import LOCAL
from core.db.session import Database
from tests.support.databases import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / 'tunesmith.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.empty_database() as url:
        yield url


def _tables(url: str) -> set[str]:
    database = Database(url)
    try:
        return set(inspect(database.engine).get_table_names())
    finally:
        database.close()


def test_the_migrated_schema_is_that_of_the_models(empty_url: str) -> None:
    migrations.upgrade(empty_url)
    assert migrations.check(empty_url) == []
    assert migrations.current(empty_url) == migrations.head()


def test_check_names_what_a_database_lacks(empty_url: str) -> None:
    migrations.upgrade(empty_url)
    database = Database(empty_url)
    with database.session(write=True) as session:
        session.execute(text("DROP TABLE workers"))
    database.close()
    assert any("workers" in difference for difference in migrations.check(empty_url))


def test_upgrading_again_changes_nothing_and_downgrading_empties(empty_url: str) -> None:
    migrations.upgrade(empty_url)
    migrations.upgrade(empty_url)
    migrations.downgrade(empty_url, "base")
    assert migrations.current(empty_url) is None
    assert _tables(empty_url) == {"alembic_version"}
    migrations.upgrade(empty_url)
    assert migrations.check(empty_url) == []


def test_the_default_project_is_that_of_the_local_user(empty_url: str) -> None:
    migrations.upgrade(empty_url)
    database = Database(empty_url)
    with database.session() as session:
        rows = session.execute(text("SELECT id, name FROM projects")).all()
    database.close()
    assert [tuple(row) for row in rows] == [(LOCAL.project_id, "default")]


def test_processes_that_upgrade_at_the_same_time_all_succeed(empty_url: str) -> None:
    if empty_url.startswith("sqlite"):
        Path(empty_url.removeprefix("sqlite:///")).parent.mkdir()
    program = (
        "import sys, migrations; print('ready', flush=True); sys.stdin.readline();"
        "migrations.upgrade(sys.argv[1])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert migrations.check(empty_url) == []
