"""Pinned adapters: what engines have in memory at all times.

The database knows the pins; engines forget them when they end. So every API process looks every few
seconds what engines keep, and has them load what is missing and let go what is pinned no longer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from core import base_models, registry
from core.errors import NotFound, TunesmithError
from core.inference.engine import AdapterRef, BaseModelRef
from core.logging import get_logger
from core.principal import Principal
from core.reads import AdapterRead
from core.registry import PinnedVersion
from service.deps import Services

SECONDS_BETWEEN_LOOKS = 5.0

log = get_logger(__name__)


async def pin(services: Services, principal: Principal, name: str, alias: str) -> AdapterRead:
    """Load what an alias points at into its engine, and have it stay there.

    Raises:
        NotFound: No such adapter or alias.
        Conflict: A gate refuses it, or too much is pinned already.
        Unavailable: The engine cannot be asked.
    """
    base_model, adapter = await run_in_threadpool(_find, services, principal, name, alias)
    await services.engine.load(base_model, adapter, keep=True)
    return await run_in_threadpool(_set, services, principal, name, alias, pinned=True)


async def unpin(services: Services, principal: Principal, name: str, alias: str) -> AdapterRead:
    """Let engines forget what an alias points at when nobody uses it.

    Raises:
        NotFound: No such adapter or alias.
    """
    read = await run_in_threadpool(_set, services, principal, name, alias, pinned=False)
    with suppress(TunesmithError):
        await align(services)
    return read


async def align(services: Services) -> dict[str, str]:
    """Have engines keep what is pinned, and nothing else.

    Returns:
        Digest → why it could not be loaded, as a code.

    Raises:
        Unavailable: No engine can be asked.
    """
    wanted = await run_in_threadpool(_wanted, services)
    status = await services.engine.status()
    kept = {
        PinnedVersion(adapter.base_digest, adapter.digest)
        for adapter in status.adapters
        if adapter.kept
    }
    for version in kept - wanted.keys():
        await services.engine.release(version.digest)
    failures = {}
    for version in sorted(wanted.keys() - kept):
        try:
            adapter = AdapterRef(digest=version.digest)
            await services.engine.load(wanted[version], adapter, keep=True)
        except TunesmithError as error:
            failures[version.digest] = error.code
    return failures


async def keep_aligned(services: Services) -> None:
    """Look after the pins until cancelled."""
    told: dict[str, str] = {}
    while True:
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        # An engine or a database that is down is told by others; the next look is soon.
        with suppress(TunesmithError, SQLAlchemyError):
            failures = await align(services)
            for digest, code in failures.items() - told.items():
                log.warning("pinned_adapter_not_loaded", digest=digest, code=code)
            told = failures


def _find(
    services: Services, principal: Principal, name: str, alias: str
) -> tuple[BaseModelRef, AdapterRef]:
    with services.database.session() as session:
        found = registry.resolve(session, principal, f"{name}:{alias}")
        base_model = base_models.get_ref_by_digest(session, found.base_digest)
    return base_model, AdapterRef(digest=found.digest)


def _set(
    services: Services, principal: Principal, name: str, alias: str, *, pinned: bool
) -> AdapterRead:
    with services.database.session(write=True) as session:
        return registry.set_pin(session, principal, name, alias, pinned=pinned)


def _wanted(services: Services) -> dict[PinnedVersion, BaseModelRef]:
    found = {}
    with services.database.session() as session:
        for version in registry.list_pinned(session):
            # Without its base model it cannot be loaded anywhere.
            with suppress(NotFound):
                found[version] = base_models.get_ref_by_digest(session, version.base_digest)
    return found
