"""The short form of `make soak`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest
import torch

from core.inference.engine import AdapterRef, Engine, EngineEvent, GenerateRequest, Started
from core.inference.lean.linear import Precision, offered_precisions
from tests.soak.__main__ import MOST_GROWTH_MIB, Plan, soak

pytestmark = pytest.mark.long


@pytest.mark.parametrize("precision", offered_precisions(torch.device("cpu")))
def test_no_answer_comes_from_other_weights_whatever_happens(
    tmp_path: Path, precision: Precision
) -> None:
    """Both precisions together are ten thousand requests."""
    plan = Plan(requests=5000, adapters=24, bank=8, seed=1, precision=precision)
    outcome = soak(tmp_path, plan)
    assert outcome.wrong == []
    assert outcome.failed == 0
    assert outcome.growth_mib <= MOST_GROWTH_MIB
    counts = outcome.counts
    # Otherwise nothing was tried.
    assert counts["complete"] > 4000
    assert counts["judged tokens"] > 10_000
    for name in ("cancelled", "given up", "evictions", "base_loads", "registered again"):
        assert counts[name] > 10, name
    assert counts["reused_prompt_tokens"] > 10_000
    assert sum(counts[name] for name in counts if name.startswith("load refused")) < 100


class _Confused:
    """An engine that now and then answers with the adapter of the request before."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last: AdapterRef | None = None
        self._asked = 0
        self.mistakes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerateRequest) -> Any:
        self._asked += 1
        wanted, last = request.adapter, self._last
        if wanted is None or last is None or wanted == last or self._asked % 7:
            self._last = wanted or last
            return await self._engine.generate(request)
        swapped = request.model_copy(update={"adapter": last})
        stream = await self._engine.generate(swapped)
        self.mistakes += 1
        return _Mislabelled(stream, wanted.digest)


class _Mislabelled:
    """Events that name another adapter than the one that computed them."""

    def __init__(self, stream: Any, digest: str) -> None:
        self._stream, self._digest = stream, digest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        event: EngineEvent = await anext(self._stream)
        if isinstance(event, Started):
            return event.model_copy(update={"adapter_digest": self._digest})
        return event

    async def aclose(self) -> None:
        await self._stream.aclose()


@pytest.mark.parametrize("precision", offered_precisions(torch.device("cpu")))
def test_it_would_notice(tmp_path: Path, precision: Precision) -> None:
    confused: list[_Confused] = []

    def disguise(engine: Engine) -> Any:
        confused.append(_Confused(engine))
        return confused[0]

    plan = Plan(requests=400, adapters=8, bank=4, seed=2, precision=precision)
    outcome = soak(tmp_path, plan, disguise)
    [engine] = confused
    # All but those whose client left before the first token that tells them apart.
    assert engine.mistakes > 20
    assert len(outcome.wrong) > 0.7 * engine.mistakes
