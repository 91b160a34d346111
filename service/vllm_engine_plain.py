"""Under which name a vLLM server computes requests for a base model without an adapter."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from core.inference.engine import BaseModelRef
from service.vllm_engine_front import FrontProcess
from service.vllm_engine_http import VllmServer


class PlainModels:
    """Names of base models at one server.

    Args:
        server: The server.
        front: Writes adapters of zeros.
        neutral_root: Directory for them, under the path that the server sees, too. With it,
            requests without an adapter go with one of zeros; without it they go to the base model
            itself, which a vLLM server on CPUs computes wrongly beside requests with an adapter.
    """

    def __init__(self, server: VllmServer, front: FrontProcess, neutral_root: Path | None) -> None:
        self._server = server
        self._front = front
        self._root = neutral_root

    async def ensure(self, base: BaseModelRef, served_name: str, listed: Collection[str]) -> str:
        """Return the name that requests without an adapter use.

        Args:
            base: The base model.
            served_name: Its own name at the server.
            listed: Names of the adapters that the server knows.

        Raises:
            Conflict: Code `adapter_refused` or `adapters_not_loadable`; as for any adapter.
            Unavailable: The server is gone.
        """
        if self._root is None:
            return served_name
        name = f"tunesmith-none-{base.digest}"
        if name not in listed:
            directory = str(self._root / base.digest)
            await self._front.ask("write_neutral", base=base.model_dump(), directory=directory)
            # Several at a time do no harm: one that is there already stays.
            await self._server.load_adapter(name, directory)
        return name
