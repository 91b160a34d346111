"""`python -m engine`: listen first, then load the model libraries, then answer."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import uvicorn

from core.config import Settings
from core.errors import TunesmithError
from core.inference.budgets import Budgets
from core.inference.local_engine import LocalEngine
from core.lifeline import exit_with_parent
from core.logging import configure, get_logger
from core.storage import ArtifactStore, open_store
from engine.channels import Channels
from engine.listening import open_listener
from engine.server import create_app

if TYPE_CHECKING:
    from core.inference.model_runner import ModelRunner

log = get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an engine until SIGTERM or SIGINT; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="unix:PATH or http://HOST:PORT; the local socket"
    )
    options = parser.parse_args(arguments)
    settings = Settings()
    configure(settings, "engine")
    exit_with_parent(settings.grace_seconds)

    address = options.listen or f"unix:{settings.engine_socket}"
    secret = settings.engine_secret.get_secret_value()
    try:
        store = open_store(settings)
    except TunesmithError as error:
        log.error("engine_has_no_store", message=error.message, hint=error.hint)
        return 1
    try:
        listener = open_listener(address, secret=secret)
    except TunesmithError as error:
        log.error("engine_cannot_listen", message=error.message, hint=error.hint)
        return 1
    log.info("engine_listening", address=address)
    over_tcp = listener.family != socket.AF_UNIX
    return _serve(settings, store, listener, secret if over_tcp else None)


def _serve(
    settings: Settings, store: ArtifactStore, listener: socket.socket, secret: str | None
) -> int:
    crashed = False

    def on_crash() -> None:
        nonlocal crashed
        crashed = True
        server.should_exit = True

    engine = LocalEngine(
        lambda: _make_runner(settings),
        store.adapter_path,
        max_adapters=settings.engine_max_adapters,
        max_waiting=settings.engine_max_waiting,
        budgets=Budgets(
            bases=settings.engine_base_bytes,
            rows=settings.engine_kv_bytes,
            adapters=settings.engine_adapter_bytes,
            prefixes=settings.engine_prefix_bytes,
        ),
        on_crash=on_crash,
    )
    channels = Channels()
    config = uvicorn.Config(
        create_app(engine, secret, channels),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, int(settings.grace_seconds / 2)),
    )
    server = _Server(config, channels)

    def stop_serving(signum: int, frame: object) -> None:
        server.should_exit = True

    # Uvicorn has its own handlers while it serves, and raises what it caught again afterwards.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop_serving)
    engine.start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.stop()
    return 1 if crashed else 0


class _Server(uvicorn.Server):
    """Lets the requests that it has end before it stops, and then the connections for events."""

    def __init__(self, config: uvicorn.Config, channels: Channels) -> None:
        super().__init__(config)
        self._channels = channels

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; called once, in the event loop."""
        self._channels.stop()
        await super().shutdown(sockets)


def _make_runner(settings: Settings) -> ModelRunner:
    # Imported here, in the engine thread: the process answers its status in the meantime.
    from core.data.quiet import silence_libraries, spin_briefly

    spin_briefly()
    silence_libraries()
    from core.inference.model_runner import ModelRunner

    # What was imported stays; no collection between two tokens has to look at all of it.
    gc.collect()
    gc.freeze()
    return ModelRunner(settings.device, settings.engine_threads, settings.engine_precision)


if __name__ == "__main__":
    sys.exit(main())
