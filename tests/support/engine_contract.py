"""What every Engine has to keep, run against each implementation with real parts.

A subclass gives the fixture `harness`. All its tests share one engine, with room for two adapters
and two waiting requests.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.rendering import render_prompt
from core.data.tokenizer import load_tokenizer
from core.errors import InvalidInput
from core.inference.engine import (
    BaseModelRef,
    Engine,
    GenerateRequest,
    Message,
)
from tests.support.engine_limits import Harness, LimitsContract, is_running, wait_for
from tests.support.engine_world import Collected, World, collect, make_request

TOLERANCE = 1e-3


def reference_logprobs(base: BaseModelRef, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities by transformers and PEFT alone, shape (tokens, vocabulary)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)


class EngineContract(LimitsContract):
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
            await wait_for(lambda: is_running(engine, 1), "the stream did not start")
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

    def test_a_seed_means_the_same_beside_other_adapters(
        self, harness: Harness, world: World
    ) -> None:
        kinds: list[dict[str, Any]] = [
            {"top_k": 20},
            {"top_p": 0.9, "repetition_penalty": 1.2},
            {"min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        ]
        requests = [
            make_request(
                world.base, adapter, temperature=1.3, seed=number, max_new_tokens=16, logprobs=0,
                **kind,
            )
            for number, kind in enumerate(kinds)
            for adapter in (None, world.a, world.b)
        ]  # fmt: skip

        async def scenario(engine: Engine) -> tuple[list[Collected], list[Collected]]:
            alone = [await collect(engine, request) for request in requests]
            return alone, await asyncio.gather(*(collect(engine, one) for one in requests))

        alone, beside = harness.run(scenario)
        assert [answer.token_ids for answer in beside] == [answer.token_ids for answer in alone]
        assert len({tuple(answer.token_ids) for answer in alone}) == len(requests)

    # Ends of an answer.

    def test_characters_are_never_split_between_two_events(
        self, harness: Harness, world: World
    ) -> None:
        pattern = "(🚀|é|漢){6}"
        request = make_request(
            world.base, world.a, n=3, temperature=2.0, seed=8, max_new_tokens=60, logprobs=0,
            response_format={"type": "regex", "regex": pattern},
        )  # fmt: skip
        answer = harness.run(lambda engine: collect(engine, request))
        for index, text in answer.texts.items():
            assert re.fullmatch(pattern, text)
            pieces = answer.deltas[index]
            assert not any("\ufffd" in piece for piece in pieces)
            # Of a character's tokens all but the last show nothing.
            assert "" in pieces[:-1]
            assert len(pieces) > len(text)

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


def _spaces(world: World) -> list[int]:
    tokenizer = load_tokenizer(world.base.path)
    return [id_ for id_ in range(384) if not tokenizer.decode([id_]).strip()]
