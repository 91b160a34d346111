"""What a vLLM server is told, what its words mean, and who is next there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from core.artifacts import tree_digest
from core.config import Settings
from core.errors import Conflict, InvalidInput, TunesmithError, Unavailable
from core.inference.engine import (
    BaseModelRef,
    Delta,
    Done,
    EngineEvent,
    Failed,
    Finished,
    SamplingParams,
    Started,
)
from core.inference.generation import Answer
from core.jobs.servable import check_servable
from core.specs import JobSpec
from service.vllm_engine_base import ServedBases
from service.vllm_engine_fields import completion_body
from service.vllm_engine_http import ModelCard, ModelMissing, VllmServer
from service.vllm_engine_stream import Clock, Totals, VllmStream
from service.vllm_engine_turns import Turns
from tests.support.factories import make_base_directory

# Fields.


def body_of(**sampling: Any) -> dict[str, Any]:
    return completion_body(
        model="tunesmith-x",
        ids=[1, 2],
        max_new_tokens=7,
        end_ids=[9],
        sampling=SamplingParams(**sampling),
        cache_salt="project-1",
    )


def test_every_field_has_its_counterpart() -> None:
    body = body_of(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.3, logit_bias={5: -1.5}, seed=3, n=2, logprobs=4,
        min_new_tokens=2, stop_token_ids=[8, 9], stop=["never sent"],
    )  # fmt: skip
    assert body == {
        "model": "tunesmith-x", "prompt": [1, 2], "n": 2, "max_tokens": 7, "min_tokens": 2,
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "logit_bias": {"5": -1.5}, "seed": 3,
        "logprobs": 4, "return_tokens_as_token_ids": True, "stop_token_ids": [8, 9], "stop": [],
        "ignore_eos": False, "skip_special_tokens": True, "spaces_between_special_tokens": False,
        "return_token_ids": True, "cache_salt": "project-1", "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_nothing_is_left_to_the_defaults_of_the_model() -> None:
    body = body_of()
    for field in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
        assert body[field] is not None


def test_several_greedy_answers_are_several_prompts() -> None:
    assert body_of(n=3)["prompt"] == [[1, 2]] * 3
    assert body_of(n=3)["n"] == 1
    assert body_of(n=3, temperature=1)["prompt"] == [1, 2]
    assert body_of(n=3, temperature=1)["n"] == 3


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json": '{"type": "object"}'}),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}},
            {"json": '{"type": "integer"}'},
        ),
        ({"type": "regex", "regex": "a|b"}, {"regex": "a|b"}),
    ],
)
def test_forms_are_structured_outputs(wanted: dict[str, Any], told: dict[str, Any] | None) -> None:
    assert body_of(response_format=wanted).get("structured_outputs") == told


def test_a_temperature_that_would_be_raised_is_refused() -> None:
    with pytest.raises(InvalidInput) as refused:
        body_of(temperature=0.005)
    assert (refused.value.code, refused.value.field) == ("not_honoured", "temperature")


# Streams.


def frame(**members: Any) -> bytes:
    return f"data: {json.dumps(members, ensure_ascii=False)}\n\n".encode()


def piece(text: str = "", index: int = 0, **members: Any) -> bytes:
    """Return a chunk whose tokens are the text's characters; its own text is the server's."""
    ids = [ord(character) for character in text]
    return frame(choices=[{"index": index, "text": "theirs", "token_ids": ids, **members}])


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


END_ID = 0
USAGE = frame(choices=[], usage={"prompt_tokens_details": {"cached_tokens": 16}})
END = USAGE + b"data: [DONE]\n\n"


def read(
    chunks: list[bytes],
    deadline_seconds: float | None = None,
    max_new_tokens: int = 100,
    **sampling: Any,
) -> tuple[list[EngineEvent], list[Totals]]:
    """Return the events after the first one, and what was told at the end."""
    totals: list[Totals] = []
    asked = SamplingParams(**sampling)
    answers = [
        Answer(
            index,
            prompt_ids=[ord("?")],
            decode=decode,
            token_text=lambda id_: f"<{chr(id_)}>",
            end_ids={END_ID},
            sampling=asked,
            max_new_tokens=max_new_tokens,
        )
        for index in range(asked.n)
    ]

    async def main() -> list[EngineEvent]:
        async def content() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk
            if deadline_seconds is not None:
                await asyncio.Event().wait()

        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=content()))
        async with httpx2.AsyncClient(transport=transport) as client:
            request = client.build_request("POST", "http://vllm/v1/completions")
            stream = VllmStream(
                await client.send(request, stream=True),
                started=Started(
                    prompt_tokens=20, base_digest="b", adapter_digest=None, precision="bf16"
                ),
                answers=answers,
                logprobs=asked.logprobs,
                clock=Clock(deadline_seconds),
                on_end=totals.append,
            )
            events = [event async for event in stream]
            await stream.aclose()
            return events

    started, *events = asyncio.run(main())
    assert isinstance(started, Started)
    return events, totals


def texts(events: list[EngineEvent], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)


def finished(events: list[EngineEvent]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def test_chunks_may_come_in_any_pieces_and_with_any_characters() -> None:
    text = "a\u2028b\x85c\r\nGrüße 🚀"
    sent = b": keep-alive\n\n" + piece(text) + piece("!\0", finish_reason="stop") + END
    whole, totals = read([sent])
    cut, _ = read([sent[i : i + 1] for i in range(len(sent))])
    assert texts(whole) == texts(cut) == text + "!"
    done = whole[-1]
    assert isinstance(done, Done)
    assert (done.prompt_tokens, done.completion_tokens) == (20, len(text) + 2)
    assert totals == [Totals(prompt=20, reused=16, completion=len(text) + 2)]


def test_a_stop_string_is_met_here_and_never_shows() -> None:
    chunks = [piece("one t"), piece("wo th"), piece("ree four"), piece("x")]
    events, totals = read(chunks, stop=["four", "two three"])
    assert texts(events) == "one "
    assert finished(events) == [Finished(finish_reason="stop", completion_tokens=13)]
    assert isinstance(events[-1], Done)
    assert totals[0].completion == 13


def test_what_might_have_become_a_stop_string_comes_with_the_end() -> None:
    chunks = [piece("a tw", finish_reason="length"), END]
    events, totals = read(chunks, stop=["two"], max_new_tokens=4)
    assert texts(events) == "a tw"
    assert finished(events)[0].finish_reason == "length"
    assert totals[0].reused == 16, "the rest of the response was not read"


def test_an_answer_that_the_server_ends_for_reasons_of_its_own_is_whole() -> None:
    chunks = [piece("a tw"), piece("", finish_reason="stop"), END]
    events, _ = read(chunks, stop=["two"])
    assert texts(events) == "a tw"
    assert finished(events) == [Finished(finish_reason="stop", completion_tokens=4)]


def test_one_answer_that_is_cut_leaves_the_others_alone() -> None:
    chunks = [
        piece("a STOP"), piece("b", index=1), piece("more"),
        piece("cdefg", index=1, finish_reason="length"), END,
    ]  # fmt: skip
    events, _ = read(chunks, n=2, temperature=1, stop=["STOP"], max_new_tokens=6)
    assert (texts(events, 0), texts(events, 1)) == ("a ", "bcdefg")
    assert [(f.index, f.finish_reason, f.completion_tokens) for f in finished(events)] == [
        (0, "stop", 6),
        (1, "length", 6),
    ]


def test_the_best_tokens_come_in_order_and_without_the_chosen_one_on_top() -> None:
    logprobs = {
        "tokens": ["token_id:120"],
        "token_logprobs": [-3.0],
        "top_logprobs": [{"token_id:120": -3.0, "token_id:97": -0.1, "token_id:98": -2.0}],
    }
    sent = piece("x", logprobs=logprobs, finish_reason="stop")
    events, _ = read([sent, END], logprobs=2)
    entry = next(event for event in events if isinstance(event, Delta)).logprobs[0]
    assert (entry.token, entry.token_id, entry.logprob) == ("<x>", 120, -3.0)
    assert entry.top == [(97, "<a>", -0.1), (98, "<b>", -2.0)]


@pytest.mark.parametrize(
    "rest",
    [
        [],
        [b"data: {"],
        [frame(error={"message": "secret internals", "code": 500})],
        [frame(nothing=1)],
        [piece("x", index=5)],
        [piece("x", finish_reason="abort")],
    ],
)
def test_a_stream_that_makes_no_sense_ends_with_a_failure(rest: list[bytes]) -> None:
    events, totals = read([piece("a"), *rest])
    assert texts(events) == "a"
    assert isinstance(events[-1], Failed)
    assert events[-1].error["code"] == "engine_lost"
    assert "secret" not in json.dumps(events[-1].error)
    assert len(totals) == 1


def test_a_deadline_ends_a_stream() -> None:
    events, totals = read([piece("a")], deadline_seconds=0.2)
    assert isinstance(events[-1], Failed)
    assert events[-1].error["code"] == "deadline_exceeded"
    assert len(totals) == 1


# Errors.


def answering(answers: dict[str, tuple[int, Any]]) -> VllmServer:
    server = VllmServer("http://vllm:1", api_key="k")

    def answer(request: httpx2.Request) -> httpx2.Response:
        status, members = answers[request.url.path]
        return httpx2.Response(status, json=members)

    server._client = httpx2.AsyncClient(
        transport=httpx2.MockTransport(answer), base_url="http://vllm:1"
    )
    return server


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


@pytest.mark.parametrize(
    ("status", "members", "kind", "code"),
    [
        (400, error("logprobs too large"), InvalidInput, "engine_refused"),
        (401, {"error": "Unauthorized"}, Unavailable, "engine_secret_wrong"),
        (429, error("busy"), Unavailable, "engine_full"),
        (500, error("EngineCore encountered an issue"), Unavailable, "engine_unavailable"),
        (503, ["?"], Unavailable, "engine_unavailable"),
        (302, None, TunesmithError, "internal_error"),
    ],
)
def test_statuses_have_a_meaning(
    status: int, members: Any, kind: type[TunesmithError], code: str
) -> None:
    async def main() -> None:
        with pytest.raises(kind) as refused:
            await answering({"/v1/completions": (status, members)}).ask({})
        assert refused.value.code == code

    asyncio.run(main())


def test_a_model_that_is_gone_is_not_a_clients_error() -> None:
    async def main() -> None:
        server = answering({"/v1/completions": (404, error("The model `x` does not exist."))})
        for call in (server.ask({}), server.stream({})):
            with pytest.raises(ModelMissing):
                await call

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ({"/v1/load_lora_adapter": (404, {"detail": "Not Found"})}, "adapters_not_loadable"),
        (
            {
                "/v1/load_lora_adapter": (500, error("LoRA rank 64 is greater than max")),
                "/health": (200, None),
            },
            "adapter_refused",
        ),
        (
            {"/v1/load_lora_adapter": (500, error("dead")), "/health": (503, None)},
            "engine_unavailable",
        ),
        ({"/v1/load_lora_adapter": (401, {"error": "Unauthorized"})}, "engine_secret_wrong"),
        ({"/v1/load_lora_adapter": (200, None)}, None),
        ({"/v1/load_lora_adapter": (400, error("'x' has already been loaded."))}, None),
    ],
)
def test_a_load_fails_for_the_adapters_sake_or_the_servers(
    answers: dict[str, tuple[int, Any]], code: str | None
) -> None:
    async def main() -> TunesmithError | None:
        try:
            await answering(answers).load_adapter("x", "/adapters/x")
        except TunesmithError as failure:
            return failure
        return None

    failure = asyncio.run(main())
    assert (failure and failure.code) == code
    if code == "adapter_refused":
        assert "rank 64" in str(failure)


# Base models.


def test_a_base_model_is_found_by_its_files_or_by_a_served_digest(tmp_path: Any) -> None:
    directory = make_base_directory(tmp_path / "base")
    wanted = BaseModelRef(name="m", digest=tree_digest(directory), path=str(directory))
    here = ModelCard(id="m", root=str(directory))
    far = ModelCard(id=f"m-{wanted.digest}", root="/models/m")
    adapter = ModelCard(id="a", root=str(directory), parent="m")
    strangers = [ModelCard(id="m", root="/models/m"), ModelCard(id="m", root="org/m"), adapter]

    async def main() -> None:
        bases = ServedBases()
        assert await bases.find([*strangers, here], wanted) == here
        assert await bases.find([*strangers, far], wanted) == far
        with pytest.raises(Conflict) as refused:
            await bases.find(strangers, wanted)
        assert refused.value.code == "base_model_not_served"
        assert wanted.digest in str(refused.value.hint)

        # A file that is changed under the server's feet is noticed, although its digest was known.
        (directory / "config.json").write_text('{"changed": true}')
        with pytest.raises(Conflict):
            await bases.find([here], wanted)

    asyncio.run(main())


# Turns.


def test_projects_take_turns_and_the_queue_is_bounded() -> None:
    async def main() -> None:
        turns = Turns(max_rows=4, max_waiting=3)
        await turns.take("a", 3)
        order: list[str] = []

        async def ask(project: str, rows: int) -> None:
            await turns.take(project, rows)
            order.append(project)

        asked = [asyncio.ensure_future(ask(*who)) for who in (("a", 2), ("b", 2), ("a", 1))]
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting, order) == (1, 3, [])
        with pytest.raises(Unavailable) as full:
            await turns.take("c", 4)
        assert full.value.code == "engine_full"

        turns.give("a", 3)
        await asyncio.gather(asked[0], asked[1])
        # The first by age, then the project that had nothing.
        assert order == ["a", "b"]
        asked[2].cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        turns.give("a", 2)
        turns.give("b", 2)
        assert (turns.running, turns.waiting) == (0, 0)
        await turns.take("c", 100)
        assert turns.running == 1

    asyncio.run(main())


def test_a_turn_that_comes_as_its_request_leaves_is_given_back() -> None:
    async def main() -> None:
        turns = Turns(max_rows=1, max_waiting=3)
        await turns.take("a", 1)
        leaving = asyncio.ensure_future(turns.take("b", 1))
        await asyncio.sleep(0)
        turns.give("a", 1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (turns.running, turns.waiting) == (0, 0)
        await turns.take("c", 1)

    asyncio.run(main())


# Jobs.


@pytest.mark.parametrize(
    ("urls", "highest", "rank", "refused"),
    [
        ("vllm+http://a:1", 32, 64, True),
        ("http://b:1,vllm+http://a:1", 32, 33, True),
        ("vllm+http://a:1", 32, 32, False),
        ("vllm+http://a:1", 0, 256, False),
        ("http://b:1", 32, 64, False),
    ],
)
def test_a_job_whose_adapter_no_server_would_take_is_refused(
    urls: str, highest: int, rank: int, refused: bool
) -> None:
    settings = Settings(engine_urls=urls, vllm_max_lora_rank=highest)
    spec = JobSpec.model_validate(
        {"base_model": "m", "dataset": "file-1", "lora": {"r": rank, "alpha": rank}}
    )
    if not refused:
        check_servable(spec, settings)
        return
    with pytest.raises(InvalidInput) as caught:
        check_servable(spec, settings)
    assert (caught.value.code, caught.value.field) == ("rank_not_servable", "lora.r")
