"""Worker processes that reported themselves, and duties that one process at a time performs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from core.capabilities import Capabilities
from core.db.models import Lease, Worker
from core.db.repositories.dialect import insert_into
from core.db.types import database_epoch


class WorkerRepository:
    """Reports of workers, timed by the database's clock."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def report(
        self,
        worker_id: str,
        *,
        queue: str,
        host: str,
        pid: int,
        job_id: str | None,
        capabilities: Capabilities,
    ) -> None:
        """Insert or refresh a worker."""
        values = {
            "queue": queue,
            "host": host,
            "pid": pid,
            "job_id": job_id,
            "heartbeat_epoch": database_epoch(),
            "device": capabilities.device,
            "memory_bytes": capabilities.memory_bytes,
            "warm_base": capabilities.warm_base,
            "absent_base_models": sorted(capabilities.absent_base_models),
        }
        self._session.execute(
            insert_into(self._session, Worker)
            .values(id=worker_id, **values)
            .on_conflict_do_update(index_elements=["id"], set_=values)
        )

    def forget(self, worker_id: str) -> None:
        """Remove a worker; removing one that is not there is no error."""
        self._session.execute(delete(Worker).where(Worker.id == worker_id))

    def forget_silent(self, seconds: float) -> None:
        """Remove workers that have not reported for `seconds`."""
        self._session.execute(
            delete(Worker)
            .where(Worker.heartbeat_epoch < database_epoch() - seconds)
            .execution_options(synchronize_session=False)
        )

    def list(self) -> Sequence[tuple[Worker, float]]:
        """Return all workers with the seconds since their last report."""
        rows = self._session.execute(
            select(Worker, database_epoch() - Worker.heartbeat_epoch).order_by(Worker.id)
        )
        return [(row[0], row[1]) for row in rows]


class LeaseRepository:
    """Duties held by one process at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def take(self, name: str, holder: str, seconds: float) -> bool:
        """Take or keep a duty for `seconds`; False while another process holds it."""
        statement = insert_into(self._session, Lease).values(
            name=name, holder=holder, expires_epoch=database_epoch() + seconds
        )
        taken = self._session.execute(
            statement.on_conflict_do_update(
                index_elements=["name"],
                set_={
                    "holder": statement.excluded.holder,
                    "expires_epoch": statement.excluded.expires_epoch,
                },
                where=or_(
                    Lease.holder == statement.excluded.holder,
                    Lease.expires_epoch < database_epoch(),
                ),
            ).returning(Lease.name)
        )
        return taken.first() is not None
