"""Fixtures that every kind of test shares: settings, store, and real databases."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrations
from core.auth import LOCAL, Principal
from core.config import Settings
from core.db.session import Database
from core.secret_files import file_variables_of, variables_of
from core.storage import LocalStore
from tests.support.databases import PostgresServer, running_postgres, running_redis
from tests.support.object_store import ObjectStoreServer, running_s3


@pytest.fixture(scope="module", autouse=True)
def _imports_stay() -> None:
    """Keep what is there out of later collections, of which training and engines do many.

    A process that runs tests has imported everything: without this they take half of its time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    for field in Settings.model_fields:
        for name in (*variables_of(Settings, field), *file_variables_of(Settings, field)):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Defaults with a data directory of the test's own."""
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def store(settings: Settings) -> LocalStore:
    """An empty artifact store in the data directory."""
    return LocalStore(settings.root)


@pytest.fixture
def principal() -> Principal:
    """The local user of project `default`."""
    return LOCAL


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrations.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_database(settings: Settings, _sqlite_template: Path) -> Iterator[Database]:
    """A migrated SQLite database where the settings look for it."""
    settings.root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_sqlite_template, settings.root / "tunesmith.db")
    database = Database(settings.resolved_database_url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One Postgres server for all tests; take `postgres_url` for a database of your own."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """A migrated Postgres database without rows; mark the test `postgres`."""
    return postgres_server.migrated_database()


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[Database]:
    """A migrated Postgres database without rows; mark the test `postgres`."""
    database = Database(postgres_url)
    yield database
    database.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> Database:
    """A migrated database without rows, once on SQLite and once on Postgres."""
    chosen: Database = request.getfixturevalue(f"{request.param}_database")
    return chosen


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[str]:
    with running_redis() as url:
        yield url


@pytest.fixture
def redis_url(_redis_server: str) -> str:
    """An empty Redis; mark the test `redis`."""
    import redis

    with redis.Redis.from_url(_redis_server) as client:
        client.flushall()
    return _redis_server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ObjectStoreServer]:
    """One S3 server for all tests; take `s3_url` for a store of your own."""
    with running_s3() as server:
        yield server


@pytest.fixture
def s3_url(s3_server: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store on a real S3 server, which this process finds."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_url()
