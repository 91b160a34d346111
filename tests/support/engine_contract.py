"""What every Engine has to keep, run against each implementation with real parts.

A subclass gives the fixture `harness`. All its tests share one engine, with room for two adapters
and two waiting requests.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
import torch

from core.artifacts import read_manifest
from core.data.rendering import render_prompt
from core.data.tokenizer import load_tokenizer
from core.errors import Conflict, InvalidInput, NotFound, TunesmithError, Unavailable
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Engine,
    GenerateRequest,
    Message,
)
from tests.support.adapters import make_adapter
from tests.support.engine_world import Collected, World, collect, collect_rest, make_request, spoil

MAX_ADAPTERS = 2
MAX_WAITING = 2
TOLERANCE = 1e-3

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


def reference_logprobs(base: BaseModelRef, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities by transformers and PEFT alone, shape (tokens, vocabulary)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)


class EngineContract:
    """Subclass as `Test…` with the fixtures `harness` and `world`."""

    # Parity.

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
    @pytest.mark.parametrize("name", ["base", "a", "b"])
    @pytest.mark.parametrize("words", [3, 120])
    def test_it_computes_what_transformers_and_peft_compute(
        self, harness: Harness, world: World, name: str, words: int
    ) -> None:
        adapter = None if name == "base" else getattr(world, name)
        messages = [Message(role="user", content=" ".join(["fox", "dog", "Paris"] * (words // 3)))]
        request = make_request(
            world.base, adapter, messages=messages, max_new_tokens=24, min_new_tokens=24, logprobs=3
        )
        answer = harness.run(lambda engine: collect(engine, request))

        tokenizer = load_tokenizer(world.base.path)
        prompt = render_prompt([m.model_dump() for m in messages], tokenizer).ids
        assert answer.started.prompt_tokens == len(prompt)
        assert answer.started.adapter_digest == (adapter.digest if adapter else None)
        files = world.locate_adapter(adapter.digest) if adapter else None
        expected = reference_logprobs(world.base, files, prompt + answer.token_ids)
        eos = tokenizer.eos_token_id
        for position, entry in enumerate(answer.logprobs[0], start=len(prompt) - 1):
            row = expected[position]
            assert abs(entry.logprob - row[entry.token_id].item()) < TOLERANCE
            assert len(entry.top) == 3
            for token_id, _, logprob in entry.top:
                assert abs(logprob - row[token_id].item()) < TOLERANCE
            row = row.index_fill(0, torch.tensor([eos]), float("-inf"))
            best, second = torch.topk(row, 2).values.tolist()
            if best - second > TOLERANCE:
                assert entry.token_id == int(row.argmax())
        ids = answer.token_ids
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ids) == 24 == answer.finished[0].completion_tokens
        assert answer.finished[0].finish_reason == "length"

    def test_each_adapter_answers_in_its_own_way(self, harness: Harness, world: World) -> None:
        async def scenario(engine: Engine) -> list[str]:
            return [
                (await collect(engine, make_request(world.base, adapter, max_new_tokens=20))).text
                for adapter in (None, world.a, world.b, None)
            ]

        base, a, b, base_again = harness.run(scenario)
        assert len({base, a, b}) == 3
        assert base == base_again

    # Several requests at a time.

    def test_interleaved_requests_keep_their_own_adapters(
        self, harness: Harness, world: World
    ) -> None:
        def requests() -> list[GenerateRequest]:
            return [
                make_request(world.base, adapter, prompt=prompt, max_new_tokens=30)
                for prompt in ("The quick", "Hello there, how")
                for adapter in (None, world.a, world.b)
            ]

        async def alone(engine: Engine) -> list[str]:
            return [(await collect(engine, request)).text for request in requests()]

        async def together(engine: Engine) -> list[str]:
            answers = await asyncio.gather(*(collect(engine, r) for r in requests()))
            return [answer.text for answer in answers]

        assert harness.run(together) == harness.run(alone)

    def test_an_adapter_loads_while_another_request_streams(
        self, harness: Harness, world: World
    ) -> None:
        request = make_request(world.base, world.a, max_new_tokens=400, min_new_tokens=400)

        async def scenario(engine: Engine) -> tuple[str, str, bool]:
            alone = (await collect(engine, request)).text
            await engine.unload(world.c.digest)
            streaming = asyncio.ensure_future(collect(engine, request))
            await wait_for(lambda: _is_running(engine, 1), "the stream did not start")
            cold = await collect(engine, make_request(world.base, world.c, max_new_tokens=4))
            still_streaming = not streaming.done()
            assert cold.done is not None
            assert cold.done.timings.load_ms > 0
            return alone, (await streaming).text, still_streaming

        alone, beside, still_streaming = harness.run(scenario)
        assert still_streaming, "the short request waited for the long one"
        assert alone == beside

    def test_a_cold_adapter_is_loaded_once_for_all_who_wait(
        self, harness: Harness, world: World
    ) -> None:
        async def scenario(engine: Engine) -> int:
            await engine.unload(world.a.digest)
            before = (await engine.status()).loads
            requests = [make_request(world.base, world.a, max_new_tokens=4) for _ in range(5)]
            answers = await asyncio.gather(*(collect(engine, request) for request in requests))
            assert len({answer.text for answer in answers}) == 1
            return (await engine.status()).loads - before

        assert harness.run(scenario) == 1

    def test_a_seed_means_the_same_whatever_the_neighbours_do(
        self, harness: Harness, world: World
    ) -> None:
        def request(seed: int, **more: Any) -> GenerateRequest:
            return make_request(
                world.base, world.a, temperature=1.2, top_p=0.95, seed=seed, max_new_tokens=20,
                **more,
            )  # fmt: skip

        async def scenario(engine: Engine) -> tuple[str, list[str], Collected]:
            alone = await collect(engine, request(5))
            beside = await asyncio.gather(
                *(collect(engine, request(seed)) for seed in (5, 6, 7)),
            )
            return alone.text, [b.text for b in beside], await collect(engine, request(5, n=3))

        alone, beside, several = harness.run(scenario)
        assert beside[0] == alone
        assert len(set(beside)) == 3
        assert [several.texts[index] for index in range(3)] == beside

    # Ends of an answer.

    def test_a_stop_string_never_shows_not_even_in_part(
        self, harness: Harness, world: World
    ) -> None:
        whole = harness.run(
            lambda engine: collect(engine, make_request(world.base, world.a, max_new_tokens=40))
        )
        # From the middle of one delta to the middle of a later one, so that it spans tokens.
        pieces = [piece for piece in whole.deltas[0] if piece]
        start = len("".join(pieces[:4])) + len(pieces[4]) // 2
        stop = whole.text[start : start + max(4, len(pieces[4]) + 1)]
        cut = whole.text.index(stop)
        request = make_request(world.base, world.a, max_new_tokens=40, stop=["\x00never", stop])
        answer = harness.run(lambda engine: collect(engine, request))
        assert answer.text == whole.text[:cut]
        assert answer.finished[0].finish_reason == "stop"
        assert answer.finished[0].completion_tokens < 40

    def test_every_token_has_a_log_probability_the_last_one_too(
        self, harness: Harness, world: World
    ) -> None:
        request = make_request(
            world.base, temperature=1.5, seed=1, n=4, max_new_tokens=200, logprobs=0
        )
        answer = harness.run(lambda engine: collect(engine, request))
        assert sorted(answer.finished) == [0, 1, 2, 3]
        reasons = {finished.finish_reason for finished in answer.finished.values()}
        assert "stop" in reasons, "no answer met the end token; choose another seed"
        for index, finished in answer.finished.items():
            assert len(answer.logprobs[index]) == finished.completion_tokens
            assert all(entry.logprob <= 0 and not entry.top for entry in answer.logprobs[index])
            if finished.finish_reason == "stop":
                assert answer.logprobs[index][-1].token == "<|im_end|>"
                assert "<|im_end|>" not in answer.texts[index]

    def test_a_stop_token_ends_the_answer_and_does_not_show(
        self, harness: Harness, world: World
    ) -> None:
        whole = harness.run(
            lambda engine: collect(
                engine, make_request(world.base, world.a, max_new_tokens=20, logprobs=0)
            )
        )
        stop = whole.token_ids[8]
        until = whole.token_ids.index(stop)
        request = make_request(
            world.base, world.a, max_new_tokens=20, logprobs=0, stop_token_ids=[stop]
        )
        answer = harness.run(lambda engine: collect(engine, request))
        assert answer.token_ids == whole.token_ids[: until + 1]
        assert answer.finished[0].finish_reason == "stop"
        assert whole.text.startswith(answer.text)
        assert answer.text != whole.text

    # What may be chosen.

    def test_bias_and_penalties_reach_the_logits(self, harness: Harness, world: World) -> None:
        async def scenario(engine: Engine) -> list[list[int]]:
            return [
                (
                    await collect(
                        engine, make_request(world.base, max_new_tokens=6, logprobs=0, **sampling)
                    )
                ).token_ids
                for sampling in (
                    {"logit_bias": {40: 100.0}},
                    {"logit_bias": {40: 100.0}, "temperature": 1.0, "min_p": 0.5, "seed": 3},
                    {"logit_bias": {40: 2.0, 41: 1.0}, "presence_penalty": 2.0},
                )
            ]

        forced, drawn, _ = harness.run(scenario)
        assert forced == drawn == [40] * 6

    def test_answers_have_the_form_that_was_asked_for(self, harness: Harness, world: World) -> None:
        schema = {
            "type": "object",
            "properties": {"size": {"enum": ["S", "M", "L"]}, "fits": {"type": "boolean"}},
            "required": ["size", "fits"],
            "additionalProperties": False,
        }
        json_schema = {"type": "json_schema", "json_schema": {"schema": schema}}
        pattern = {"type": "regex", "regex": "(yes|no), [a-c]{3}!"}
        plain = make_request(world.base, world.a, max_new_tokens=20)
        formed = make_request(
            world.base, world.b, n=3, temperature=1.0, seed=4, max_new_tokens=200,
            logit_bias=dict.fromkeys(_spaces(world), -30.0), response_format=json_schema,
        )  # fmt: skip
        matched = make_request(world.base, max_new_tokens=60, response_format=pattern)

        async def scenario(engine: Engine) -> tuple[str, list[Collected]]:
            alone = (await collect(engine, plain)).text
            return alone, await asyncio.gather(
                *(collect(engine, r) for r in (plain, formed, matched))
            )

        alone, (beside, several, one) = harness.run(scenario)
        assert beside.text == alone
        for text in several.texts.values():
            answer = json.loads(text)
            assert set(answer) == {"size", "fits"}
            assert answer["size"] in {"S", "M", "L"}
            assert isinstance(answer["fits"], bool)
        assert re.fullmatch(pattern["regex"], one.text)
        for finished in (*several.finished.values(), *one.finished.values()):
            assert finished.finish_reason == "stop"

    def test_an_answer_that_reaches_its_limit_may_be_incomplete(
        self, harness: Harness, world: World
    ) -> None:
        request = make_request(
            world.base, max_new_tokens=1, response_format={"type": "json_object"}
        )
        answer = harness.run(lambda engine: collect(engine, request))
        assert (answer.text, answer.finished[0].finish_reason) == ("{", "length")

    @pytest.mark.parametrize(
        ("sampling", "code", "field"),
        [
            ({"stop_token_ids": [0, 384]}, "unknown_token_id", "stop_token_ids"),
            ({"logit_bias": {384: 1.0}}, "unknown_token_id", "logit_bias"),
            (
                {"response_format": {"type": "regex", "regex": "("}},
                "invalid_grammar",
                "response_format.regex",
            ),
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": 1}}}},
                "invalid_grammar",
                "response_format.json_schema.schema",
            ),
        ],
    )
    def test_what_cannot_be_honoured_is_refused(
        self, harness: Harness, world: World, sampling: dict[str, Any], code: str, field: str
    ) -> None:
        refused = self._refused(harness, make_request(world.base, **sampling))
        assert (type(refused), refused.code, refused.field) == (InvalidInput, code, field)

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
                await wait_for(lambda: _is_waiting(engine, MAX_WAITING), "nobody waits")
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
                await wait_for(lambda: _is_waiting(engine, 1), "the second does not wait")
                waiting.cancel()
                await wait_for(lambda: _is_waiting(engine, 0), "it waits for nobody")
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


def _spaces(world: World) -> list[int]:
    tokenizer = load_tokenizer(world.base.path)
    return [id_ for id_ in range(384) if not tokenizer.decode([id_]).strip()]


async def _is_running(engine: Engine, running: int) -> bool:
    return (await engine.status()).running == running


async def _is_waiting(engine: Engine, waiting: int) -> bool:
    return (await engine.status()).waiting == waiting
