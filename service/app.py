"""The application: its parts, its middleware and its routes.

Imports no model library: the API is up in about a second and stays small.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from core.config import Settings
from core.db.session import Database
from core.inference.engine import Engine
from core.queue import CeleryQueue, JobQueue
from core.storage import open_store
from service import errors, pins
from service.deps import Services
from service.engine_pool import EnginePool
from service.middleware import BodyLimitMiddleware, GuardMiddleware, RequestMiddleware
from service.openapi import DESCRIPTION, TAGS, complete_document
from service.routes import (
    adapters,
    datasets,
    exports,
    generate,
    job_control,
    job_logs,
    job_validation,
    jobs,
    models,
    operations,
    webhooks,
)
from service.uploads import MULTIPART_OVERHEAD_BYTES
from service.version import service_version


def create_app(
    settings: Settings, *, engine: Engine | None = None, queue: JobQueue | None = None
) -> FastAPI:
    """Return the API for `settings`; nothing is connected to before the first request.

    The database is not migrated here: `GET /readyz` says when that is due.

    Args:
        settings: Configuration of this process.
        engine: What computes answers; the configured engines by default.
        queue: What wakes workers; the configured broker by default.
    """
    closing = AsyncExitStack()
    database = Database(settings.resolved_database_url)
    closing.callback(database.close)
    if queue is None:
        queue = CeleryQueue(settings)
        closing.callback(queue.close)
    store = open_store(settings)
    if engine is None:
        engine = EnginePool.from_settings(settings, store)
        closing.push_async_callback(engine.aclose)
    services = Services(
        settings=settings,
        database=database,
        store=store,
        engine=engine,
        queue=queue,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with closing:
            pinning = asyncio.create_task(pins.keep_aligned(services))
            try:
                yield
            finally:
                pinning.cancel()
                with suppress(asyncio.CancelledError):
                    await pinning

    app = _Api(
        title="Tunesmith",
        version=service_version(),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        # The pages of FastAPI load their scripts from elsewhere; the document itself needs nobody.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        middleware=_middleware(settings),
        lifespan=lifespan,
    )
    app.state.services = services
    errors.install(app)
    for module in (
        datasets,
        job_validation,
        jobs,
        job_logs,
        job_control,
        adapters,
        exports,
        webhooks,
        generate,
        models,
        operations,
    ):
        app.include_router(module.router)
    return app


class _Api(FastAPI):
    """FastAPI with problem documents in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        if self.openapi_schema is None:
            complete_document(super().openapi())
        return super().openapi()


def _middleware(settings: Settings) -> list[Middleware]:
    origins = [part.strip() for part in settings.allowed_origins.split(",") if part.strip()]
    limits = {
        "/datasets": settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES,
        "/adapters/import": settings.max_adapter_bytes + MULTIPART_OVERHEAD_BYTES,
    }
    chain = [
        Middleware(RequestMiddleware),
        Middleware(GuardMiddleware, settings=settings),
        Middleware(BodyLimitMiddleware, default_bytes=settings.max_request_bytes, limits=limits),
    ]
    if origins:
        chain.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-ID"],
            )
        )
    return chain
