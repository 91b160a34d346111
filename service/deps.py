"""What routes ask for: the parts of the service, sessions, and bodies that hold storable values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Path, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from core.config import Settings
from core.db.session import Database
from core.inference.engine import Engine
from core.queue import JobQueue
from core.storage import ArtifactStore
from service.validation import check_json_values

MAX_PAGE_SIZE = 200
_LARGEST_NUMBER = 2**31 - 1
_UPLOAD_SLOTS = 16


@dataclass(frozen=True)
class Services:
    """The parts that one API process holds for all its requests.

    Attributes:
        upload_slots: A thread per upload; senders may be slow, so they have threads of their own
            and never take those in which all other requests read the database.
        stopping: Set when the process was asked to stop; endless streams then end.
    """

    settings: Settings
    database: Database
    store: ArtifactStore
    engine: Engine
    queue: JobQueue
    upload_slots: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_UPLOAD_SLOTS))
    stopping: Event = field(default_factory=Event)


# On the event loop: a dependency that is no coroutine function is run in a thread of the pool, and
# each way there and back waits for a processor where the engine and a trainer use all of them.
async def get_services(request: Request) -> Services:
    """Return the parts of the service."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


def _reading(services: ServicesDep) -> Iterator[Session]:
    with services.database.session() as session:
        yield session


def _writing(services: ServicesDep) -> Iterator[Session]:
    with services.database.session(write=True) as session:
        yield session


# Function scope: the session has committed, or failed to, before the answer leaves.
ReadSession = Annotated[Session, Depends(_reading, scope="function")]
WriteSession = Annotated[Session, Depends(_writing, scope="function")]


async def check_body(request: Request) -> None:
    """Refuse a JSON body with texts or numbers that cannot be stored.

    Raises:
        InvalidInput: See `check_json_values`.
    """
    if "json" not in request.headers.get("content-type", ""):
        return
    raw = await request.body()
    if raw:
        await run_in_threadpool(check_json_values, await request.json(), raw)


CheckedBody = Depends(check_body)

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE, description="Entries per page.")]
Cursor = Annotated[
    str | None, Query(max_length=200, description="`next_cursor` of the page before.")
]
VersionNumber = Annotated[int, Path(ge=1, le=_LARGEST_NUMBER, description="Version number.")]
Offset = Annotated[int, Query(ge=0, le=_LARGEST_NUMBER)]
