"""New adapters show that they do something, without a pass of their own where there is room."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from core.errors import Conflict
from core.inference.engine import AdapterRef, Engine
from core.inference.lean.native import NativeDecoder
from core.inference.rows import RowModel
from tests.support.adapters import make_adapter, reseal
from tests.support.engine_harness import LocalHarness
from tests.support.engine_world import World, collect, make_request


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def useless(world: World, tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    """An adapter that changes nothing."""
    path = tmp_path_factory.mktemp("useless") / "zero"
    return world.keep(make_adapter(path, Path(world.base.path), scale=0.0))


@pytest.fixture
def harness(world: World) -> Iterator[LocalHarness]:
    harness = LocalHarness(world, max_waiting=16)
    yield harness
    harness.engine.stop()


def _count_passes(rows: RowModel, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Have adapters noted that get a pass of their own; those of rows are not."""
    decoder = getattr(rows, "_decoder", None)
    if not isinstance(decoder, NativeDecoder):
        pytest.skip("the kernel is not compiled, or not for this processor")
    found: list[str | None] = []
    original = rows.logits_of

    def logits_of(adapter: str | None, token_ids: Sequence[int]) -> Tensor:
        found.append(adapter)
        return original(adapter, token_ids)

    monkeypatch.setattr(rows, "logits_of", logits_of)
    return found


def test_one_that_is_new_is_looked_at_in_the_pass_of_its_request(
    world: World, harness: LocalHarness, useless: AdapterRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        await collect(engine, make_request(world.base))
        passes = _count_passes(harness.rows(world.base), monkeypatch)
        await collect(engine, make_request(world.base, world.a))
        # Of the base model, once and for all.
        assert passes == [None]
        with pytest.raises(Conflict) as refused:
            await engine.generate(make_request(world.base, useless))
        assert refused.value.code == "adapter_has_no_effect"
        assert passes == [None]
        assert [adapter.digest for adapter in (await engine.status()).adapters] == [world.a.digest]

    harness.run(scenario)


def test_many_that_are_new_at_once_are_all_looked_at(
    world: World, harness: LocalHarness, useless: AdapterRef
) -> None:
    good = [make_request(world.base, adapter) for adapter in (None, world.a, world.b, world.c)]

    async def scenario(engine: Engine) -> None:
        before = [(await collect(engine, request)).text for request in good]
        for adapter in (world.a, world.b, world.c):
            await engine.unload(adapter.digest)
        asked = [*good, make_request(world.base, useless)] * 2
        answers = await asyncio.gather(
            *(collect(engine, request) for request in asked), return_exceptions=True
        )
        for place in (0, 5):
            texts = [getattr(answer, "text", None) for answer in answers[place : place + 4]]
            assert texts == before
            refused = answers[place + 4]
            assert isinstance(refused, Conflict)
            assert refused.code == "adapter_has_no_effect"
        status = await engine.status()
        assert status.load_failures == 1
        assert useless.digest not in {adapter.digest for adapter in status.adapters}
        assert status.row_bytes == 0

    harness.run(scenario)


def test_one_that_is_only_loaded_is_looked_at_by_itself(
    world: World, harness: LocalHarness, useless: AdapterRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        await collect(engine, make_request(world.base))
        passes = _count_passes(harness.rows(world.base), monkeypatch)
        await engine.load(world.base, world.a)
        assert world.a.digest in passes
        with pytest.raises(Conflict) as refused:
            await engine.load(world.base, useless, keep=True)
        assert refused.value.code == "adapter_has_no_effect"
        seen = len(passes)
        await collect(engine, make_request(world.base, world.a))
        assert len(passes) == seen
        status = await engine.status()
        assert [adapter.digest for adapter in status.adapters] == [world.a.digest]

    harness.run(scenario)


@pytest.mark.parametrize("ids", [[5, 5, 5, 7], [5, 7]])
def test_an_effect_on_attention_alone_is_seen(
    world: World, harness: LocalHarness, tmp_path: Path, ids: list[int]
) -> None:
    path = make_adapter(tmp_path / "queries", Path(world.base.path), targets=("q_proj",))
    adapter = world.keep(reseal(path, golden_token_ids=ids))
    request = make_request(world.base, adapter, max_new_tokens=4, min_new_tokens=4)
    answer = harness.run(lambda engine: collect(engine, request))
    assert answer.finished[0].completion_tokens == 4
