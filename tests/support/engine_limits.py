"""What an Engine refuses, and what it keeps to: the part of its contract that is about limits."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from core.artifacts import CONFIG_FILE, TOKENIZER_CONFIG_FILE, read_manifest
from core.errors import Conflict, InvalidInput, NotFound, TunesmithError, Unavailable
from core.inference.engine import (
    AdapterRef,
    Engine,
    GenerateRequest,
    Message,
)
from tests.support.adapters import make_adapter, reseal
from tests.support.engine_world import Collected, World, collect, collect_rest, make_request, spoil

MAX_ADAPTERS = 2
MAX_WAITING = 2

T = TypeVar("T")


class Harness(Protocol):
    """One running engine."""

    def run(self, scenario: Callable[[Engine], Awaitable[T]]) -> T:
        """Run a scenario against the engine in an event loop of its own."""
        ...


async def wait_for(condition: Callable[[], Awaitable[bool]], message: str) -> None:
    async def poll() -> None:
        while not await condition():
            await asyncio.sleep(0.01)

    try:
        await asyncio.wait_for(poll(), 20)
    except TimeoutError:
        raise AssertionError(message) from None


async def is_idle(engine: Engine) -> bool:
    status = await engine.status()
    return status.running == 0 and status.waiting == 0


async def is_running(engine: Engine, running: int) -> bool:
    return (await engine.status()).running == running


async def is_waiting(engine: Engine, waiting: int) -> bool:
    return (await engine.status()).waiting == waiting


class LimitsContract:
    """See `tests.support.engine_contract.EngineContract`."""

    @pytest.fixture(autouse=True)
    def _keys_and_values_are_given_back(self, harness: Harness) -> Iterator[None]:
        """After every test, whatever it has done."""
        yield

        async def scenario(engine: Engine) -> None:
            await wait_for(lambda: is_idle(engine), "requests are left over")
            assert (await engine.status()).row_bytes == 0

        harness.run(scenario)

    # Refusals.

    def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(
        self, harness: Harness, world: World
    ) -> None:
        refused = self._refused(harness, make_request(world.base, prompt="fox jumps " * 400))
        assert (type(refused), refused.code) == (InvalidInput, "prompt_too_long")
        assert "512" in refused.message
        far = self._refused(harness, make_request(world.base, prompt="x" * 100_000))
        assert (far.code, far.field) == ("prompt_too_long", "prompt")

    def test_too_many_new_tokens_are_refused_but_the_default_is_fitted(
        self, harness: Harness, world: World
    ) -> None:
        prompt = "1 " * 210
        asked = make_request(world.base, prompt=prompt, max_new_tokens=500)
        refused = self._refused(harness, asked)
        assert (refused.code, refused.field) == ("context_length_exceeded", "max_new_tokens")
        fitted = make_request(world.base, prompt=prompt, min_new_tokens=1, temperature=0)
        answer = harness.run(lambda engine: collect(engine, fitted))
        assert answer.done is not None
        assert answer.done.prompt_tokens + answer.done.completion_tokens <= 512

    def test_a_model_without_a_template_reads_messages_as_chatml(
        self, harness: Harness, world: World
    ) -> None:
        messages = [Message(role="user", content="Hi")]
        text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        by_messages = make_request(world.twin, messages=messages, max_new_tokens=8)
        by_prompt = make_request(world.twin, prompt=text, max_new_tokens=8)

        async def scenario(engine: Engine) -> tuple[Collected, Collected]:
            return await collect(engine, by_messages), await collect(engine, by_prompt)

        rendered, plain = harness.run(scenario)
        assert rendered.started.prompt_tokens == plain.started.prompt_tokens
        assert rendered.text == plain.text

    def test_messages_are_rendered_with_the_adapters_own_template(
        self, harness: Harness, world: World
    ) -> None:
        messages = [Message(role="user", content="Hi")]
        by_messages = make_request(world.base, world.c, messages=messages, max_new_tokens=8)
        by_prompt = make_request(world.base, world.c, prompt="Hi ### ", max_new_tokens=8)

        async def scenario(engine: Engine) -> tuple[Collected, Collected]:
            return await collect(engine, by_messages), await collect(engine, by_prompt)

        rendered, plain = harness.run(scenario)
        assert rendered.started.prompt_tokens == plain.started.prompt_tokens
        assert rendered.text == plain.text

    @pytest.mark.parametrize(
        "code",
        [
            "digest_mismatch",
            "base_model_mismatch",
            "tokenizer_mismatch",
            "template_mismatch",
            "invalid_manifest",
            "invalid_adapter_config",
            "invalid_adapter_weights",
            "adapter_shape_mismatch",
            "adapter_not_finite",
            "adapter_has_no_effect",
        ],
    )
    def test_a_gate_refuses_and_leaves_no_trace(
        self, harness: Harness, world: World, code: str, tmp_path: Path
    ) -> None:
        base, adapter = spoil(world, code, tmp_path)
        plain = make_request(world.base, max_new_tokens=16)
        tuned = make_request(world.base, world.b, max_new_tokens=16)

        async def scenario(engine: Engine) -> None:
            before = [(await collect(engine, request)).text for request in (plain, tuned)]
            beside = asyncio.ensure_future(collect(engine, tuned))
            counted = await engine.status()
            for _ in range(2):
                with pytest.raises(Conflict) as refused:
                    await engine.generate(make_request(base, adapter))
                assert refused.value.code == code
                assert refused.value.hint
            assert (await beside).text == before[1]
            with pytest.raises(Conflict):
                await engine.load(base, adapter)
            after = await engine.status()
            # The second and third time it was remembered, not tried again.
            assert after.load_failures == counted.load_failures + 1
            assert adapter.digest not in {a.digest for a in after.adapters if base == world.base}
            assert [(await collect(engine, r)).text for r in (plain, tuned)] == before

        harness.run(scenario)

    @pytest.mark.parametrize("change", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
    def test_what_the_engine_cannot_apply_is_refused_by_its_name(
        self, harness: Harness, world: World, change: dict[str, Any], tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(world.locate_adapter(world.a.digest), tmp_path / "adapter"))
        config = path / CONFIG_FILE
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        adapter = world.keep(reseal(path))
        refused = self._refused(harness, make_request(world.base, adapter))
        [name] = change
        assert (type(refused), refused.code) == (Conflict, "invalid_adapter_config")
        assert refused.field == name
        assert name in refused.message
        assert "plain LoRA" in (refused.hint or "")

    @pytest.mark.parametrize("token_id", [-1, 384, 2**40])
    def test_golden_tokens_that_the_model_does_not_have_are_refused(
        self, harness: Harness, world: World, token_id: int, tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(world.locate_adapter(world.b.digest), tmp_path / "adapter"))
        # Another digest than the good one's, whose files these otherwise are.
        (path / TOKENIZER_CONFIG_FILE).write_text(f'{{"x": {token_id}}}')
        adapter = world.keep(reseal(path, golden_token_ids=[1, token_id]))
        refused = self._refused(harness, make_request(world.base, adapter))
        assert (type(refused), refused.code) == (Conflict, "invalid_manifest")

    def test_an_adapter_is_found_by_its_digest_as_soon_as_it_is_published(
        self, harness: Harness, world: World, tmp_path: Path
    ) -> None:
        path = make_adapter(tmp_path / "late", Path(world.base.path), seed=44)
        late = AdapterRef(digest=read_manifest(path).digest)
        refused = self._refused(harness, make_request(world.base, late))
        assert (type(refused), refused.code) == (NotFound, "adapter_files_missing")
        world.keep(path)
        answer = harness.run(lambda engine: collect(engine, make_request(world.base, late)))
        assert answer.started.adapter_digest == late.digest

    def test_a_changed_base_model_is_refused(self, harness: Harness, world: World) -> None:
        wrong = world.base.model_copy(update={"digest": "0" * 64})
        refused = self._refused(harness, make_request(wrong))
        assert (type(refused), refused.code) == (Conflict, "base_model_changed")

    def test_a_full_engine_says_so(self, harness: Harness, world: World) -> None:
        long = make_request(world.base, n=16, max_new_tokens=480, min_new_tokens=480)
        short = make_request(world.base, max_new_tokens=2)

        async def scenario(engine: Engine) -> None:
            async with aclosing(await engine.generate(long)):
                waiting = [
                    asyncio.ensure_future(collect(engine, short)) for _ in range(MAX_WAITING)
                ]
                await wait_for(lambda: is_waiting(engine, MAX_WAITING), "nobody waits")
                with pytest.raises(Unavailable) as refused:
                    await engine.generate(short)
                assert refused.value.code == "engine_full"
                assert refused.value.retry_after_seconds > 0
            for answer in await asyncio.gather(*waiting):
                assert answer.done is not None
                assert answer.done.timings.queue_ms > 0

        harness.run(scenario)

    # Cancellation and residency.

    def test_closing_a_stream_frees_the_engine(self, harness: Harness, world: World) -> None:
        request = make_request(world.base, world.a, n=16, max_new_tokens=480, min_new_tokens=480)

        async def scenario(engine: Engine) -> None:
            async with aclosing(await engine.generate(request)) as stream:
                await anext(stream)
            await wait_for(lambda: is_idle(engine), "the request goes on")
            assert await engine.unload(world.a.digest)
            assert world.a.digest not in {a.digest for a in (await engine.status()).adapters}

        harness.run(scenario)

    def test_leaving_the_queue_frees_the_place(self, harness: Harness, world: World) -> None:
        long = make_request(world.base, n=16, max_new_tokens=480, min_new_tokens=480)

        async def scenario(engine: Engine) -> None:
            async with aclosing(await engine.generate(long)):
                waiting = asyncio.ensure_future(engine.generate(long))
                await wait_for(lambda: is_waiting(engine, 1), "the second does not wait")
                waiting.cancel()
                await wait_for(lambda: is_waiting(engine, 0), "it waits for nobody")
            await wait_for(lambda: is_idle(engine), "the request goes on")

        harness.run(scenario)

    def test_an_evicted_adapter_comes_back_the_same(self, harness: Harness, world: World) -> None:
        request = make_request(world.base, world.a, max_new_tokens=12)

        async def scenario(engine: Engine) -> None:
            before = (await collect(engine, request)).text
            evictions = (await engine.status()).evictions
            for other in (world.b, world.c):
                loaded = await engine.load(world.base, other)
                assert loaded.bytes > 0
            status = await engine.status()
            assert {adapter.digest for adapter in status.adapters} == {
                world.b.digest,
                world.c.digest,
            }
            assert status.resident_bytes == sum(adapter.bytes for adapter in status.adapters)
            assert status.evictions > evictions
            assert (await collect(engine, request)).text == before

        harness.run(scenario)

    def test_unloading_waits_for_the_last_request(self, harness: Harness, world: World) -> None:
        request = make_request(world.base, world.a, max_new_tokens=150, min_new_tokens=150)

        async def scenario(engine: Engine) -> None:
            whole = (await collect(engine, request)).text
            stream = await engine.generate(request)
            assert await engine.unload(world.a.digest)
            assert (await collect_rest(stream)).text == whole
            assert world.a.digest not in {a.digest for a in (await engine.status()).adapters}
            assert not await engine.unload(world.a.digest)

        harness.run(scenario)

    def test_the_status_counts(self, harness: Harness, world: World) -> None:
        async def scenario(engine: Engine) -> None:
            before = await engine.status()
            answer = await collect(engine, make_request(world.base, world.b, max_new_tokens=5))
            await wait_for(lambda: is_idle(engine), "the request goes on")
            after = await engine.status()
            assert answer.done is not None
            assert after.ready
            assert after.precision[world.base.digest] == "float32" == answer.started.precision
            assert after.completion_tokens - before.completion_tokens == (
                answer.done.completion_tokens
            )
            assert after.prompt_tokens - before.prompt_tokens == answer.done.prompt_tokens
            timings = answer.done.timings
            assert 0 < timings.first_token_ms <= timings.total_ms

        harness.run(scenario)

    def _refused(self, harness: Harness, request: GenerateRequest) -> TunesmithError:
        async def scenario(engine: Engine) -> TunesmithError:
            with pytest.raises(TunesmithError) as refused:
                await engine.generate(request)
            return refused.value

        return harness.run(scenario)
