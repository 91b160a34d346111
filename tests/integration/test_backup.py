"""Backups are whole or not there, and nobody waits for them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core import auth
from core.backup import verify
from core.config import Settings
from core.db.session import Database
from core.errors import Conflict, InvalidInput
from core.storage import LocalStore
from tests.support.backups import (
    backup,
    live_in_a_little,
    publish_version,
    read_table,
)
from tests.support.command_line import succeed, tunesmith
from tests.support.factories import (
    add_dataset,
    add_project,
)
from tests.support.polling import wait_until


@pytest.fixture
def lived_in_sqlite(sqlite_database: Database, store: LocalStore) -> None:
    live_in_a_little(sqlite_database, store)


def test_only_its_owner_may_read_a_backup_and_none_is_overwritten(
    sqlite_database: Database, store: LocalStore, lived_in_sqlite: None, tmp_path: Path
) -> None:
    publish_version(sqlite_database, store, tmp_path / "artifact")
    root = backup(sqlite_database, store, tmp_path / "backup")
    assert any((root / "adapters").iterdir())
    for path in (root, *root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    with pytest.raises(Conflict) as caught:
        backup(sqlite_database, store, root)
    assert caught.value.code == "backup_exists"
    verify(root, lambda *_: None)


def test_what_the_store_has_lost_is_named_and_the_rest_is_saved(
    sqlite_database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    lost = add_dataset(sqlite_database, store, content=b"lost")
    altered = add_dataset(sqlite_database, store, content=b"altered")
    good = add_dataset(sqlite_database, store, content=b"good")
    (settings.root / "blobs" / lost.sha256).unlink()
    (settings.root / "blobs" / altered.sha256).write_bytes(b"AltereD")
    outcome = tunesmith("backup", tmp_path / "backup", "--data-dir", settings.root, "--json")
    assert outcome.code == 1
    assert set(outcome.json["damaged"]) == {lost.sha256, altered.sha256}
    manifest = verify(tmp_path / "backup", lambda *_: None)
    assert manifest.blobs == [good.sha256]


def test_writers_do_not_wait_for_a_backup_and_it_shows_one_instant(
    database: Database, store: LocalStore, tmp_path: Path
) -> None:
    for number in range(5):
        add_project(database, f"early-{number}")
    stop, added = threading.Event(), list[str]()

    def write() -> None:
        while not stop.is_set():
            # The key refers to a project that is made in the same breath.
            with database.session(write=True) as session:
                auth.create_key(session, f"late-{len(added)}", "key", ["read"])
            added.append("")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(5):
            count = len(added)
            root = backup(database, store, tmp_path / f"backup-{number}")
            wait_until(lambda count=count: len(added) > count, 10, "the writer waits")  # type: ignore[misc]
            projects = {row["id"] for row in read_table(root, "projects")}
            keys = read_table(root, "api_keys")
            assert {key["project_id"] for key in keys} <= projects
            assert len(projects) == 6 + len(keys)
    finally:
        stop.set()
        thread.join(10)


def test_a_killed_backup_leaves_nothing_that_looks_like_one(
    sqlite_database: Database, store: LocalStore, settings: Settings, tmp_path: Path
) -> None:
    for number in range(3):
        add_dataset(sqlite_database, store, content=b"%d" % number)
    program = (
        "import os, signal, sys; from pathlib import Path; import migrations;"
        "from core.backup import create_backup; from core.db.session import Database;"
        "from core.storage import LocalStore\n"
        "def progress(what, done, total):\n"
        "    if what.startswith('copying') and done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "create_backup(Database(sys.argv[1]), LocalStore(Path(sys.argv[2])), migrations.head(),"
        " Path(sys.argv[3]), progress)"
    )
    target = tmp_path / "backups" / "monday"
    ended = subprocess.run(
        [sys.executable, "-c", program, sqlite_database.url, settings.root, target],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not target.exists()
    (leftover,) = target.parent.iterdir()
    assert leftover.name.endswith(".incomplete")
    with pytest.raises(InvalidInput) as caught:
        verify(leftover, lambda *_: None)
    assert caught.value.code == "no_backup"
    backup(sqlite_database, store, target)


def test_the_commands_say_what_they_did(
    sqlite_database: Database,
    store: LocalStore,
    settings: Settings,
    lived_in_sqlite: None,
    tmp_path: Path,
) -> None:
    root = tmp_path / "backup"
    made = succeed("backup", root, "--data-dir", settings.root, "--json").json
    assert (made["blobs"], made["rows"]["datasets"]) == (1, 1)
    assert "whole" in succeed("restore", root, "--check").stdout
    restored = succeed("restore", root, "--data-dir", tmp_path / "new")
    assert "1 data sets and checkpoints" in restored.stdout
    assert "there is nothing at /nowhere" in restored.stderr
    again = tunesmith("restore", root, "--data-dir", tmp_path / "new")
    assert again.code == 1
    assert "not_empty" in again.stderr
    assert tunesmith("restore", tmp_path).code == 1
