"""The schema's history, and the functions that move a database along it.

Configured here and not by an alembic.ini: the database is always given by the caller. Every
function may run in several processes at once; changes happen one after another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url

from core.db.models import Base
from core.db.session import create_database

Standing = Literal["behind", "current", "ahead"]


def upgrade(url: str, revision: str = "head") -> None:
    """Bring a database to `revision`; a SQLite file is created where there is none.

    With `head` a database that a later version of the service has changed is left as it is.
    """
    file = make_url(url).database if url.startswith("sqlite") else None
    if file and file != ":memory:":
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if revision == "head" and standing(current(url)) == "ahead":
        return
    command.upgrade(_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Take a database back to `revision`; `base` empties it."""
    command.downgrade(_config(url), revision)


def current(url: str) -> str | None:
    """Return the revision a database is at; `None` for an empty one."""
    engine = create_database(url)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def head() -> str:
    """Return the newest revision."""
    revision = ScriptDirectory(str(_HERE)).get_current_head()
    assert revision is not None
    return revision


def standing(revision: str | None) -> Standing:
    """Tell how a database at `revision` stands to this version of the service.

    `ahead` is a revision that only a later version knows. It works for us: each version's changes
    leave intact what the version before it uses.
    """
    if revision == head():
        return "current"
    known = {script.revision for script in ScriptDirectory(str(_HERE)).walk_revisions()}
    return "behind" if revision is None or revision in known else "ahead"


def knows(revision: str) -> bool:
    """Tell whether a revision is part of this version's history."""
    return revision in {script.revision for script in ScriptDirectory(str(_HERE)).walk_revisions()}


def check(url: str) -> list[str]:
    """Return how a database differs from the models; empty when they agree."""
    engine = create_database(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection)
            return [repr(difference) for difference in compare_metadata(context, Base.metadata)]
    finally:
        engine.dispose()


_HERE = Path(__file__).parent
_FILE_TEMPLATE = "%%(year)d_%%(month).2d_%%(day).2d_%%(hour).2d%%(minute).2d_%%(slug)s"


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option(
        "file_template", "%%(year)d_%%(month).2d_%%(day).2d_%%(hour).2d%%(minute).2d_%%(slug)s"
    )
    config.attributes["url"] = url
    return config
