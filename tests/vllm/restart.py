"""What a vLLM server does to requests when it ends, comes back, forgets or refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from core.errors import Conflict, Unavailable
from core.inference.engine import Engine, Failed, Message
from tests.support.adapters import make_adapter
from tests.support.engine_world import World, collect, make_request
from tests.support.polling import wait_until
from tests.vllm.server import MAX_RANK, VllmHarness, VllmProcess


@pytest.fixture(scope="module")
def harness(server: VllmProcess, world: World) -> Iterator[VllmHarness]:
    harness = VllmHarness(server, world.locate_adapter, world.root / "neutral")
    yield harness
    harness.close()


def test_closing_a_stream_frees_the_server(
    server: VllmProcess, harness: VllmHarness, world: World
) -> None:
    long = make_request(world.base, world.a, n=8, max_new_tokens=480, min_new_tokens=480)

    async def scenario(engine: Engine) -> None:
        async with aclosing(await engine.generate(long)) as stream:
            for _ in range(3):
                await anext(stream)

    wait_until(lambda: server.count_running() == 0, 20, "something is still computed")
    harness.run(scenario)
    wait_until(lambda: server.count_running() == 0, 20, "the server goes on")


def test_an_adapter_that_was_unloaded_by_others_is_loaded_again(
    server: VllmProcess, harness: VllmHarness, world: World
) -> None:
    request = make_request(world.base, world.b, max_new_tokens=12)
    before = harness.run(lambda engine: collect(engine, request)).text
    server.forget(f"tunesmith-{world.b.digest}")
    status = harness.run(lambda engine: engine.status())
    assert world.b.digest not in {adapter.digest for adapter in status.adapters}
    assert harness.run(lambda engine: collect(engine, request)).text == before
    assert harness.run(lambda engine: engine.status()).loads == status.loads + 1


def test_an_adapter_that_the_server_refuses_is_refused_with_its_reason(
    harness: VllmHarness, world: World, tmp_path: Path
) -> None:
    path = make_adapter(tmp_path / "wide", Path(world.base.path), r=2 * MAX_RANK, seed=5)
    wide = world.keep(path)
    plain = make_request(world.base, world.b, max_new_tokens=12)

    async def scenario(engine: Engine) -> Conflict:
        before = (await collect(engine, plain)).text
        with pytest.raises(Conflict) as refused:
            await engine.load(world.base, wide)
        assert (await collect(engine, plain)).text == before
        return refused.value

    refused = harness.run(scenario)
    assert refused.code == "adapter_refused"
    assert "max_lora_rank" in refused.message
    assert "--max-lora-rank" in str(refused.hint)


def test_a_wrong_key_is_told_apart_from_a_server_that_is_gone(
    server: VllmProcess, world: World
) -> None:
    stranger = VllmHarness(server, world.locate_adapter, world.root / "neutral", api_key="wrong")
    try:
        with pytest.raises(Unavailable) as refused:
            stranger.run(lambda engine: engine.status())
        assert refused.value.code == "engine_secret_wrong"
    finally:
        stranger.close()


def test_a_server_that_is_killed_and_started_again_answers_as_before(
    server: VllmProcess, harness: VllmHarness, world: World
) -> None:
    request = make_request(world.base, world.a, max_new_tokens=12)
    long = make_request(world.base, world.a, n=4, max_new_tokens=480, min_new_tokens=480)

    async def kill_in_the_middle(engine: Engine) -> str:
        text = (await collect(engine, request)).text
        async with aclosing(await engine.generate(long)) as stream:
            await anext(stream)
            await anext(stream)
            server.kill()
            last = [event async for event in stream][-1]
        assert isinstance(last, Failed)
        assert last.error["code"] == "engine_lost"
        for call in (engine.generate(request), engine.status(), engine.load(world.base, world.a)):
            with pytest.raises(Unavailable) as gone:
                await call
            assert gone.value.code == "engine_unavailable"
        return text

    before = harness.run(kill_in_the_middle)

    # It comes back with another model under the same name.
    server.start(world.twin)
    with pytest.raises(Conflict) as refused:
        harness.run(lambda engine: engine.generate(make_request(world.base)))
    assert refused.value.code == "base_model_not_served"
    with pytest.raises(Conflict) as mismatched:
        harness.run(lambda engine: engine.load(world.twin, world.b))
    assert mismatched.value.code == "base_model_mismatch"
    chatml = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    rendered = make_request(
        world.twin, messages=[Message(role="user", content="Hi")], max_new_tokens=8
    )
    plain = make_request(world.twin, prompt=chatml, max_new_tokens=8)

    async def both(engine: Engine) -> list[tuple[int, str]]:
        answers = [await collect(engine, asked) for asked in (rendered, plain)]
        return [(answer.started.prompt_tokens, answer.text) for answer in answers]

    by_messages, by_prompt = harness.run(both)
    assert by_messages == by_prompt

    # And with the right one, of whose adapters it knows none.
    server.kill()
    server.start(world.base)
    loads = harness.run(lambda engine: engine.status()).loads
    assert harness.run(lambda engine: engine.status()).adapters == []
    assert harness.run(lambda engine: collect(engine, request)).text == before
    status = harness.run(lambda engine: engine.status())
    assert status.loads == loads + 1
    assert [adapter.digest for adapter in status.adapters] == [world.a.digest]
