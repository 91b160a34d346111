"""An engine in this process, as the contract suite runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from core.inference.engine import BaseModelRef, Engine
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from core.inference.rows import RowModel
from tests.support.engine_limits import MAX_ADAPTERS, MAX_WAITING
from tests.support.engine_world import World

T = TypeVar("T")


class LocalHarness:
    """A local engine in float32.

    Args:
        world: Where its adapters are.
        options: Of the engine, in place of what the contract suite wants.
    """

    def __init__(self, world: World, **options: Any) -> None:
        def make_runner() -> ModelRunner:
            self.runner = ModelRunner("cpu", threads=1, precision="float32")
            return self.runner

        self.engine = LocalEngine(
            make_runner,
            world.locate_adapter,
            **{"max_adapters": MAX_ADAPTERS, "max_waiting": MAX_WAITING, **options},
        ).start()
        assert self.engine.ready.wait(60)

    def rows(self, base: BaseModelRef) -> RowModel:
        """Return what computes a base model; use it only while the engine is idle."""
        return self.runner.bases[base.digest].rows

    def run(self, scenario: Callable[[Engine], Awaitable[T]]) -> T:
        """Run a scenario against the engine in an event loop of its own."""

        async def main() -> T:
            return await scenario(self.engine)

        return asyncio.run(main())
