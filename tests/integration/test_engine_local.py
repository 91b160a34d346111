"""What the engine inside this process does when things go wrong; see also test_engine_contract."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import LlamaForCausalLM

from core.errors import Unavailable
from core.inference.engine import AdapterRef, Engine, Failed
from core.inference.lean.linear import Precision, offered_precisions
from core.inference.lean.model import LeanModel
from core.inference.local_engine import LocalEngine
from core.inference.model_runner import ModelRunner
from tests.support.adapters import base_ref
from tests.support.engine_harness import LocalHarness
from tests.support.engine_world import World, collect, make_request

T = TypeVar("T")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_a_request_that_fails_half_way_says_so_and_fails_alone(world: World) -> None:
    harness = LocalHarness(world)
    request = make_request(world.base, max_new_tokens=200, min_new_tokens=200)

    async def scenario(engine: Engine) -> None:
        before = (await collect(engine, request)).text
        rows = harness.rows(world.base)
        assert isinstance(rows, LeanModel)
        embedding = rows._decoder.weights.embedding
        kept = embedding.clone()
        stream = await engine.generate(request)
        await anext(stream)
        with torch.no_grad():
            embedding.mul_(float("nan"))
        events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        assert events[-1].error["code"] == "logits_not_finite"
        with torch.no_grad():
            embedding.copy_(kept)
        assert (await collect(engine, request)).text == before
        assert (await engine.status()).running == 0

    harness.run(scenario)
    harness.engine.stop()


def test_adapters_that_are_fetched_slowly_hold_nobody_up(world: World) -> None:
    fetching, arrived = threading.Semaphore(0), threading.Event()

    def locate_adapter(digest: str) -> Path:
        fetching.release()
        assert arrived.wait(60)
        return world.locate_adapter(digest)

    engine = LocalEngine(
        lambda: ModelRunner("cpu", threads=1, precision="float32"), locate_adapter
    ).start()
    assert engine.ready.wait(60)

    async def scenario() -> None:
        # As many as are fetched at a time.
        adapters = [AdapterRef(digest=digest * 64) for digest in "0123"]
        waiting = [
            asyncio.ensure_future(collect(engine, make_request(world.base, adapter)))
            for adapter in [*adapters, world.a]
        ]
        for _ in adapters:
            assert await asyncio.to_thread(fetching.acquire, timeout=60)
        answer = await collect(engine, make_request(world.base, max_new_tokens=3))
        assert answer.done is not None
        assert not any(task.done() for task in waiting)
        arrived.set()
        *refused, answer = await asyncio.gather(*waiting, return_exceptions=True)
        assert {error.code for error in refused} == {"adapter_files_missing"}
        assert answer.started.adapter_digest == world.a.digest

    asyncio.run(scenario())
    engine.stop()


def test_a_stopped_engine_fails_what_is_not_done(world: World) -> None:
    harness = LocalHarness(world)
    request = make_request(world.base, max_new_tokens=480, min_new_tokens=480, n=16)

    async def scenario(engine: Engine) -> None:
        stream = await engine.generate(request)
        await asyncio.to_thread(harness.engine.stop)
        events = [event async for event in stream]
        assert isinstance(events[-1], Failed)
        assert events[-1].error["code"] == "engine_unavailable"
        with pytest.raises(Unavailable):
            await engine.generate(request)
        with pytest.raises(Unavailable):
            await engine.status()

    harness.run(scenario)


def test_an_engine_that_cannot_start_reports_it() -> None:
    crashed: list[bool] = []

    def make_runner() -> ModelRunner:
        raise RuntimeError("no device")

    engine = LocalEngine(make_runner, Path, on_crash=lambda: crashed.append(True)).start()
    engine.stop()
    assert crashed == [True]
    assert not engine.ready.is_set()


@pytest.mark.parametrize("asked", offered_precisions(torch.device("cpu")))
def test_weights_that_half_precision_would_spoil_are_kept_in_float32(
    tmp_path: Path, asked: Precision
) -> None:
    """Up and down cancel out, but the one is above what 16 bits hold and the other below."""
    world = World(tmp_path)
    model = LlamaForCausalLM.from_pretrained(world.base.path, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1e7)
            layer.mlp.down_proj.weight.mul_(1e-7)
    path = tmp_path / "extreme"
    shutil.copytree(world.base.path, path)
    model.save_pretrained(path)
    base = ModelRunner("cpu", threads=1, precision=asked).load_base(base_ref(path))
    assert base.precision == "float32"
    ids = list(range(3, 60))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert (base.rows.logits_of(None, ids) - expected).abs().max() < 1e-3
    assert ModelRunner("cpu", threads=1, precision=asked).load_base(world.base).precision == asked
