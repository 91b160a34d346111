"""The API's process: uvicorn under our settings, logs and lifeline, with one worker or several.

Imports neither the application nor prometheus_client at the top: with several workers the latter
must find its directory in the environment first.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from core import lifeline, logging
from core.config import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def run(settings: Settings, host: str, port: int, workers: int = 1) -> int:
    """Serve the API until SIGINT or SIGTERM, or until the parent process is gone.

    Args:
        settings: Configuration; worker processes get it through the environment.
        host: Address to bind.
        port: Port to bind.
        workers: Processes that share the port.

    Returns:
        The exit code: 0, or 1 when the server could not start.
    """
    os.environ.update(settings.environment())
    if workers > 1:
        _share_metrics(settings)
    logging.configure(settings, "api")
    lifeline.exit_with_parent(settings.grace_seconds)
    config = uvicorn.Config(
        "service.server:build_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        # Longer than clients and proxies keep idle connections, so that they close them, not we.
        timeout_keep_alive=75,
    )
    if workers > 1:
        from uvicorn.supervisors import Multiprocess

        Multiprocess(config, sockets=[config.bind_socket()]).run()
        return 0
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal that stopped it once more at the end; having stopped, we return.
        signal.signal(number, lambda *_: None)
    server.run()
    return 0 if server.started else 1


def build_app() -> FastAPI:
    """Return the application, in the process and the main thread that serve it.

    uvicorn calls this once its own signal handlers are in place.
    """
    settings = Settings()
    if multiprocessing.parent_process() is not None:
        logging.configure(settings, "api")
        lifeline.exit_with_parent(settings.grace_seconds)

    from service.app import create_app

    app = create_app(settings)
    _announce_stop(app.state.services.stopping)
    # What is there now stays: no request has to wait while a collection looks at all of it.
    gc.collect()
    gc.freeze()
    return app


def _announce_stop(stopping: threading.Event) -> None:
    """Set `stopping` on the signals that end the server, which waits for its streams to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        server_handler = signal.getsignal(number)

        def handle(received: int, frame: FrameType | None, then: Any = server_handler) -> None:
            stopping.set()
            if callable(then):
                then(received, frame)

        signal.signal(number, handle)


def _share_metrics(settings: Settings) -> None:
    """Give the worker processes a fresh directory in which they add up their counters.

    Files of a worker that died stay until the next start: what it counted has happened.
    """
    directory = settings.run_dir / "prometheus"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    os.environ[_METRICS_VARIABLE] = str(directory)
