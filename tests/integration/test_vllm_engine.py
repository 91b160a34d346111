"""An engine on a vLLM server that does what a real one cannot be brought to do.

The server here is a stand-in in this process; the rest is real. `make test-vllm` runs the engine
contract against a real server.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from core.data.rendering import render_prompt
from core.data.tokenizer import load_tokenizer
from core.errors import Conflict, Unavailable
from core.inference.engine import AdapterRef, Message
from service.vllm_engine import VllmEngine
from service.vllm_engine_front import FrontProcess
from tests.support.engine_contract import reference_logprobs
from tests.support.engine_world import World, collect, make_request


class StandIn:
    """Answers as a vLLM server does, without a model.

    Attributes:
        loaded: Name → directory of the adapters that it has.
        calls: Paths in the order in which they were asked for.
        bodies: Of the streamed completions.
        loading: Loads wait for it.
        streaming: Streams wait for it after their first token.
        forgets: How many streamed requests find their model gone.
        ignores_adapters: Whether it computes everything with the base model.
        says: Tokens of its answers, chunk by chunk; by default the end of the model's name.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._tokenizer = load_tokenizer(root)
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.loading = asyncio.Event()
        self.loading.set()
        self.streaming = asyncio.Event()
        self.streaming.set()
        self.forgets = 0
        self.ignores_adapters = False
        self.says: list[list[int]] = []

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.calls.append(path)
        body = json.loads(request.content or b"{}")
        match path:
            case "/v1/models":
                return httpx2.Response(200, json={"data": self._cards()})
            case "/version":
                return httpx2.Response(200, json={"version": "0"})
            case "/v1/load_lora_adapter":
                await self.loading.wait()
                self.loaded[body["lora_name"]] = body["lora_path"]
            case "/v1/unload_lora_adapter":
                self.loaded.pop(body["lora_name"], None)
            case "/v1/completions":
                return self._complete(body)
        return httpx2.Response(200)

    def _cards(self) -> list[dict[str, Any]]:
        base = {"id": "model", "root": self.root, "parent": None, "max_model_len": 512}
        loaded = self.loaded.items()
        return [base, *({"id": name, "parent": "model", "root": root} for name, root in loaded)]

    def _complete(self, body: dict[str, Any]) -> httpx2.Response:
        model = body["model"]
        if not body.get("stream"):
            value = 0.0 if self.ignores_adapters else float(len(model))
            logprobs = {"top_logprobs": [{"token_id:5": value}]}
            choices = [{"index": i, "logprobs": logprobs} for i, _ in enumerate(body["prompt"])]
            return httpx2.Response(200, json={"choices": choices})
        self.bodies.append(body)
        if self.forgets:
            self.forgets -= 1
            self.loaded.pop(model, None)
        if model != "model" and model not in self.loaded:
            missing = {"message": f"The model `{model}` does not exist.", "code": 404}
            return httpx2.Response(404, json={"error": missing})
        return httpx2.Response(200, content=self._stream(model))

    async def _stream(self, model: str) -> AsyncIterator[bytes]:
        said = self.says or [self._tokenizer.encode(text) for text in (model[-4:], "!")]
        for number, ids in enumerate(said, start=1):
            reason = "stop" if number == len(said) else None
            choice = {"index": 0, "text": "?", "token_ids": ids, "finish_reason": reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
            await self.streaming.wait()
        yield b"data: [DONE]\n\n"


class Stage:
    """A stand-in with an engine on it, and one front for all tests.

    Args:
        world: Models and adapters.
        front: The front.
        options: Of the engine.
    """

    def __init__(self, world: World, front: FrontProcess, **options: Any) -> None:
        self.server = StandIn(world.base.path)
        self.engine = VllmEngine(
            "vllm+http://server:1", locate_adapter=world.locate_adapter, front=front, **options
        )
        self.engine._server._client = httpx2.AsyncClient(
            transport=httpx2.MockTransport(self.server), base_url="http://server:1"
        )

    def count(self, path: str) -> int:
        return self.server.calls.count(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def front(runner: asyncio.Runner) -> Iterator[FrontProcess]:
    front = FrontProcess()
    yield front
    runner.run(front.aclose())


@pytest.fixture
def play(world: World, runner: asyncio.Runner, front: FrontProcess) -> Callable[..., None]:
    def play(scenario: Callable[[Stage], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            stage = Stage(world, front, **options)
            await asyncio.wait_for(scenario(stage), 60)
            await stage.engine.aclose()

        runner.run(main())

    return play


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def ask(world: World, adapter: AdapterRef | None, **more: Any) -> Any:
    return make_request(world.base, adapter, max_new_tokens=5, **more)


Play = Callable[..., None]


def test_the_server_gets_the_tokens_that_training_saw(world: World, play: Play) -> None:
    messages = [Message(role="user", content="Hi")]
    tokenizer = load_tokenizer(world.base.path)
    by_base = render_prompt([m.model_dump() for m in messages], tokenizer).ids
    assert world.c is not None
    template = world.locate_adapter(world.c.digest) / "chat_template.jinja"
    tokenizer.chat_template = template.read_text()
    by_adapter = render_prompt([m.model_dump() for m in messages], tokenizer).ids

    async def scenario(stage: Stage) -> None:
        for adapter in (None, world.a, world.c):
            await collect(stage.engine, ask(world, adapter, messages=messages))
        # Greedy answers are asked for as that many prompts.
        assert [body["prompt"] for body in stage.server.bodies] == [
            [by_base],
            [by_base],
            [by_adapter],
        ]
        assert by_base != by_adapter
        assert {body["cache_salt"] for body in stage.server.bodies} == {"project-default"}

    play(scenario)


def test_the_text_is_what_our_own_tokenizer_makes_of_the_tokens(world: World, play: Play) -> None:
    tokenizer = load_tokenizer(world.base.path)
    # In UTF-8 bytes that are no characters, one character in two chunks, and a half at the end.
    rocket = tokenizer.encode("🚀")
    broken = [rocket[1], *tokenizer.encode("fox"), rocket[0], rocket[0]]
    said = [broken, rocket[:2], rocket[2:], tokenizer.encode(" é")[:-1]]
    assert len(rocket) == 4

    async def scenario(stage: Stage) -> None:
        stage.server.says = said
        answer = await collect(stage.engine, make_request(world.base, max_new_tokens=60))
        ids = [id_ for chunk in said for id_ in chunk]
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert "🚀" in answer.text
        assert answer.text.endswith("\ufffd")
        assert answer.finished[0].completion_tokens == len(ids)

    play(scenario)


def test_one_load_serves_all_who_wait_and_outlives_who_leaves(world: World, play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.loading.clear()
        waiting = [
            asyncio.ensure_future(collect(stage.engine, ask(world, world.a))) for _ in range(4)
        ]
        await until(lambda: stage.count("/v1/load_lora_adapter") == 1)
        waiting[0].cancel()
        stage.server.loading.set()
        answers = await asyncio.gather(*waiting[1:])
        assert {answer.text for answer in answers} == {world.a.digest[-4:] + "!"}
        assert stage.count("/v1/load_lora_adapter") == 1
        status = await stage.engine.status()
        assert (status.loads, status.running, status.waiting) == (1, 0, 0)
        assert status.adapters[0].requests == 0

    play(scenario)


def test_a_server_that_ignores_the_adapter_is_found_out(world: World, play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.ignores_adapters = True
        for _ in range(2):
            with pytest.raises(Conflict) as refused:
                await stage.engine.generate(ask(world, world.a))
            assert refused.value.code == "adapter_has_no_effect"
        assert stage.count("/v1/load_lora_adapter") == 1, "a refusal is remembered"
        assert stage.server.loaded == {}
        status = await stage.engine.status()
        assert (status.load_failures, status.adapters, status.running) == (1, [], 0)

    play(scenario)


def test_a_model_that_vanishes_at_the_last_moment_is_loaded_once_more(
    world: World, play: Play
) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.forgets = 1
        answer = await collect(stage.engine, ask(world, world.a))
        assert answer.text == world.a.digest[-4:] + "!"
        assert stage.count("/v1/load_lora_adapter") == 2

        stage.server.forgets = 2
        with pytest.raises(Unavailable) as gone:
            await stage.engine.generate(ask(world, world.a))
        assert gone.value.code == "engine_unavailable"
        assert (await stage.engine.status()).running == 0

    play(scenario)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_on_cpus_what_has_no_adapter_goes_with_one_that_changes_nothing(
    world: World, play: Play, tmp_path: Path
) -> None:
    name = f"tunesmith-none-{world.base.digest}"
    directory = tmp_path / "neutral" / world.base.digest

    async def scenario(stage: Stage) -> None:
        for _ in range(2):
            answer = await collect(stage.engine, ask(world, None))
            assert answer.started.adapter_digest is None
        assert stage.server.loaded == {name: str(directory)}
        stage.server.forgets = 1
        await collect(stage.engine, ask(world, None))
        assert {body["model"] for body in stage.server.bodies} == {name}
        assert stage.count("/v1/load_lora_adapter") == 2
        # It is nobody's adapter.
        assert (await stage.engine.status()).adapters == []

    play(scenario, neutral_root=tmp_path / "neutral")
    ids = load_tokenizer(world.base.path).encode("The quick brown")
    assert torch.equal(
        reference_logprobs(world.base, directory, ids), reference_logprobs(world.base, None, ids)
    )
    assert list(directory.parent.iterdir()) == [directory], "drafts are left over"


def test_an_adapter_from_another_place_is_loaded_anew(world: World, play: Play) -> None:
    name = f"tunesmith-{world.a.digest}"

    async def scenario(stage: Stage) -> None:
        stage.server.loaded[name] = "/where/it/was"
        await collect(stage.engine, ask(world, world.a))
        assert stage.server.loaded[name] == str(world.locate_adapter(world.a.digest))

    play(scenario)


def test_an_adapter_waits_for_room_and_the_one_that_leaves_is_unloaded(
    world: World, play: Play
) -> None:
    async def scenario(stage: Stage) -> None:
        async with aclosing(await stage.engine.generate(ask(world, world.a))) as stream:
            second = asyncio.ensure_future(collect(stage.engine, ask(world, world.b)))
            await until(lambda: stage.engine._turns.running == 2)
            assert not second.done()
            await anext(stream)
        assert (await second).text == world.b.digest[-4:] + "!"
        await until(lambda: len(stage.server.loaded) == 1)
        assert list(stage.server.loaded) == [f"tunesmith-{world.b.digest}"]

    play(scenario, max_adapters=1)


def test_a_deadline_holds_while_an_adapter_loads(world: World, play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.loading.clear()
        request = ask(world, world.a).model_copy(update={"deadline_seconds": 0.3})
        with pytest.raises(Unavailable) as late:
            await stage.engine.generate(request)
        assert late.value.code == "deadline_exceeded"
        stage.server.loading.set()
        # The load went on.
        assert (await collect(stage.engine, ask(world, world.a))).text
        assert stage.count("/v1/load_lora_adapter") == 1

    play(scenario)


def test_a_front_that_is_killed_is_replaced(world: World, front: FrontProcess, play: Play) -> None:
    async def scenario(stage: Stage) -> None:
        await collect(stage.engine, ask(world, world.c))
        live = front._live
        assert live is not None
        os.kill(live.process.pid, signal.SIGKILL)
        await until(lambda: live.ended)
        messages = [Message(role="user", content="Hi")]
        answer = await collect(stage.engine, ask(world, world.c, messages=messages))
        assert answer.text == world.c.digest[-4:] + "!"
        assert front._live is not live

    play(scenario)


def test_a_front_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """The pipes close with the process that holds them, however it ends."""

    async def main() -> int:
        front = FrontProcess()
        base = {"name": "m", "digest": "0" * 64, "path": str(tmp_path)}
        with pytest.raises(Conflict):
            await front.ask("check_base", base=base)
        live = front._live
        assert live is not None
        assert live.process.stdin is not None
        live.process.stdin.close()
        code = await asyncio.wait_for(live.process.wait(), 20)
        await front.aclose()
        return code

    assert asyncio.run(main()) != 0
