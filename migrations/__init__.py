"""The schema's history, and the functions that move a database along it.

Configured here and not by an alembic.ini: the database is always given by the caller. Every
function may run in several processes at once; changes happen one after another.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url

from core.db.models import Base
from core.db.session import create_database


def upgrade(url: str, revision: str = "head") -> None:
    """Bring a database to `revision`; a SQLite file is created where there is none."""
    file = make_url(url).database if url.startswith("sqlite") else None
    if file and file != ":memory:":
        Path(file).parent.mkdir(parents=True, exist_ok=True)
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
