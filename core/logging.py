"""Structured logs: JSON lines on stderr, or coloured text when a person is watching.

Owns the one place where logging is configured; the standard library's loggers, and through them
uvicorn's and Celery's, come out in the same form. Prompts, rows and keys are never logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from core.config import Settings

_OWN_PACKAGES = ("core", "service", "worker", "engine")
# They report every request, every look at the schema and where credentials were found.
_CHATTY = ("httpx2", "alembic", "aiobotocore", "botocore")
_SELF_CONFIGURING = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


def configure(settings: Settings, process: str = "api") -> None:
    """Send all logs of this process to stderr.

    Args:
        settings: `log_level` is applied to our own packages. What libraries say at DEBUG may hold
            users' data, so they never speak below INFO.
        process: Name of this process, a field of every line.
    """

    def name_process(_: Any, __: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        name_process,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )

    rendering: list[Processor]
    if sys.stderr.isatty():
        # The default formatter prints local variables, which may be prompts.
        plain = structlog.dev.plain_traceback
        rendering = [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    else:
        rendering = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )

    level = logging.getLevelNamesMapping()[settings.log_level]
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.INFO))
    for name in _OWN_PACKAGES:
        logging.getLogger(name).setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SELF_CONFIGURING:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(True)


@contextmanager
def bind(**values: Any) -> Iterator[None]:
    """Add fields such as `request_id` or `job_id` to every log line of the block."""
    with structlog.contextvars.bound_contextvars(**values):
        yield


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger that takes an event name and fields: `log.info("job_done", job_id=…)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
