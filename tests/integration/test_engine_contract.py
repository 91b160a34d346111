"""The engine inside this process keeps the contract, on both ways to compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.inference.engine import Engine
from core.inference.lean.model import LeanModel
from core.inference.peft_rows import PeftRows
from tests.support.engine_contract import EngineContract
from tests.support.engine_harness import LocalHarness
from tests.support.engine_world import World, collect, make_request

# An activation that the lean decoder does not know sends a model down the generic path.
KINDS = {"lean": ("silu", LeanModel), "generic": ("gelu", PeftRows)}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def world(kind: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(kind), hidden_act=KINDS[kind][0])


@pytest.fixture(scope="module")
def harness(world: World) -> Iterator[LocalHarness]:
    harness = LocalHarness(world)
    yield harness
    harness.engine.stop()


class TestLocalEngine(EngineContract):
    def test_the_base_model_does_not_change_when_adapters_come_and_go(
        self, harness: LocalHarness, world: World, kind: str
    ) -> None:
        ids = list(range(3, 60))

        async def forget(engine: Engine) -> None:
            for adapter in (await engine.status()).adapters:
                assert await engine.unload(adapter.digest)

        harness.run(lambda engine: collect(engine, make_request(world.base)))
        harness.run(forget)
        # The engine is idle, so this thread may use its model.
        rows = harness.rows(world.base)
        assert isinstance(rows, KINDS[kind][1])
        expected = rows.logits_of(None, ids)
        untouched = AutoModelForCausalLM.from_pretrained(world.base.path, dtype=torch.float32)
        with torch.inference_mode():
            reference = untouched.eval()(input_ids=torch.tensor([ids])).logits[0]
        assert torch.allclose(expected, reference, atol=1e-3)
        for adapter in (world.a, world.b, world.c):
            harness.run(
                lambda engine, adapter=adapter: collect(engine, make_request(world.base, adapter))
            )
        assert torch.equal(rows.logits_of(None, ids), expected)
        assert not torch.equal(rows.logits_of(world.c.digest, ids), expected)
        harness.run(forget)
        assert torch.equal(rows.logits_of(None, ids), expected)
        assert rows.cache_bytes == 0
