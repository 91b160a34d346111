"""What the database does to a process that stops in the middle of a transaction."""

from __future__ import annotations

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError

from core.db import session as sessions
from core.db.models import Project
from core.db.session import Database
from tests.support.polling import wait_until
from worker.lease import is_transient


@pytest.mark.postgres
def test_a_process_that_hangs_in_a_transaction_loses_its_locks(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_IDLE_TRANSACTION_SECONDS", 0.2)
    hanging, other = Database(postgres_url), Database(postgres_url)

    def is_free() -> bool:
        with other.session() as session:
            query = select(Project.id).with_for_update(skip_locked=True)
            return session.scalars(query).first() is not None

    def hang() -> None:
        with hanging.session(write=True) as session:
            session.execute(update(Project).values(last_claim_epoch=1.0))
            assert not is_free()
            wait_until(is_free, 10, "the locks last")
            session.execute(text("SELECT 1"))

    try:
        with pytest.raises(DBAPIError) as ended:
            hang()
        # What a worker says of it: try again, by then perhaps to hear that the lease is lost.
        assert is_transient(ended.value)
        with hanging.session() as session:
            assert session.scalars(select(Project.last_claim_epoch)).one() == 0.0
    finally:
        hanging.close()
        other.close()
