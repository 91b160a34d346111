from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from core.errors import Unavailable
from core.inference.engine import GenerateRequest, SamplingParams
from tests.support.api import Api, adapter_files, build_api, live_server, pack, running_api
from tests.support.polling import wait_until


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, models=("tiny", "other")) as running:
        yield running


@pytest.fixture
def digest(api: Api) -> str:
    return str(api.import_adapter("bot", pack(adapter_files())).json()["digest"])


def events_of(answer: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in answer.text.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_the_base_model_answers_a_prompt(api: Api) -> None:
    body = {"prompt": "one two three", "base_model": "tiny"}
    answer = api.client.post("/generate", json=body).json()
    assert answer["text"] == "base one two three"
    assert answer["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert answer["base_model"] == {"name": "tiny", "digest": api.base_digests["tiny"]}
    assert answer["adapter"] is None
    assert answer["precision"] == "float32"
    assert set(answer["timings"]) == {"queue_ms", "load_ms", "first_token_ms", "total_ms"}
    assert answer["choices"] == [
        {"index": 0, "text": answer["text"], "finish_reason": "stop", "logprobs": None}
    ]


@pytest.mark.parametrize("reference", ["bot", "bot@1", "bot:latest"])
def test_an_adapter_answers_by_every_reference(api: Api, digest: str, reference: str) -> None:
    messages = [{"role": "user", "content": "hi there"}]
    answer = api.client.post(
        "/generate", params={"adapter": reference}, json={"messages": messages}
    ).json()
    assert answer["text"] == f"{digest[:8]} hi there"
    assert answer["adapter"] == {"name": "bot", "version": 1, "digest": digest}
    assert answer["base_model"]["name"] == "tiny"
    sent = api.engine.requests[-1]
    assert sent.adapter is not None
    assert sent.adapter.model_dump() == {"digest": digest}
    assert sent.project_id == "project-default"


def test_sampling_fields_reach_the_engine(api: Api) -> None:
    sampling = {
        "max_new_tokens": 2,
        "min_new_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "stop": ["x"],
        "stop_token_ids": [7],
        "seed": 7,
        "n": 2,
        "logprobs": 1,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"a": 1}, "name": "n", "description": "d", "strict": True},
        },
    }
    body = {"prompt": "a b c", "base_model": "tiny", "logit_bias": {"5": -100}, **sampling}
    answer = api.client.post("/generate", json=body).json()
    sent = api.engine.requests[-1].sampling
    assert sent.model_dump() == {**sampling, "logit_bias": {5: -100.0}}
    # What one process writes another one reads.
    assert SamplingParams.model_validate_json(sent.model_dump_json(exclude_unset=True)) == sent
    assert [choice["text"] for choice in answer["choices"]] == ["base a", "base a"]
    assert answer["finish_reason"] == "length"
    assert answer["choices"][1]["logprobs"][0] == {
        "token": "base",
        "token_id": 0,
        "logprob": -0.5,
        "top": [[0, "base", -0.5]],
    }


def test_tools_and_calls_reach_the_engine(api: Api) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"id": "call_1", "function": {"name": "weather", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "call_1"},
    ]
    body = {"messages": messages, "tools": tools, "base_model": "tiny"}
    assert api.client.post("/generate", json=body).status_code == 200
    sent = api.engine.requests[-1]
    assert sent.tools == tools
    assert [m.model_dump(exclude_none=True) for m in sent.messages or []] == messages
    assert GenerateRequest.model_validate_json(sent.model_dump_json(exclude_unset=True)) == sent
    answer = api.client.post("/generate", json={"prompt": "a", "tools": tools})
    assert answer.status_code == 422


def test_a_stream_says_the_same_as_the_whole_answer(api: Api, digest: str) -> None:
    body = {"prompt": "one two", "n": 2}
    whole = api.client.post("/generate?adapter=bot", json=body).json()
    streamed = api.client.post("/generate?adapter=bot", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["cache-control"] == "no-cache"
    events = events_of(streamed)
    texts = ["", ""]
    for kind, data in events[:-1]:
        assert kind == "delta"
        texts[data["index"]] += data["text"]
    kind, done = events[-1]
    assert kind == "done"
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert done["finish_reasons"] == ["stop", "stop"]
    for member in ("usage", "adapter", "base_model", "precision"):
        assert done[member] == whole[member]


def test_without_base_model_the_only_one_answers_or_the_question_goes_back(
    api: Api, tmp_path: Path
) -> None:
    refused = api.client.post("/generate", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["code"]) == (422, "base_model_required")
    assert "tiny" in refused.json()["hint"]
    with running_api(tmp_path / "single") as single:
        assert single.client.post("/generate", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("reference", "body", "status", "code"),
    [
        ("nobody", {}, 404, "unknown_adapter"),
        ("bot@9", {}, 404, "unknown_adapter"),
        ("bot:prod", {}, 404, "unknown_adapter"),
        ("Not A Name", {}, 422, "invalid_adapter_reference"),
        ("bot@" + "9" * 40, {}, 422, "invalid_adapter_reference"),
        ("", {}, 422, "invalid_adapter_reference"),
        ("bot", {"base_model": "other"}, 409, "base_model_mismatch"),
        ("bot", {"base_model": "absent"}, 404, "unknown_base_model"),
        (None, {"base_model": "absent"}, 404, "unknown_base_model"),
        ("bot", {"max_new_tokens": 600}, 422, "context_length_exceeded"),
    ],
)
def test_no_request_is_answered_with_weights_it_did_not_ask_for(
    api: Api, digest: str, reference: str | None, body: dict[str, Any], status: int, code: str
) -> None:
    before = len(api.engine.requests)
    params = {} if reference is None else {"adapter": reference}
    answer = api.client.post("/generate", params=params, json={"prompt": "a", **body})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert len(api.engine.requests) == before + (code == "context_length_exceeded")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unavailable("full", code="engine_full", retry_after_seconds=7), 429),
        (Unavailable("starting", code="engine_starting", retry_after_seconds=7), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_busy_engine_says_when_to_retry(
    api: Api, error: Unavailable, status: int, stream: bool
) -> None:
    api.engine.unavailable = error
    body = {"prompt": "a", "base_model": "tiny", "stream": stream}
    answer = api.client.post("/generate", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, error.code)
    assert answer.headers["retry-after"] == "7"


def test_a_failure_in_mid_answer_is_an_error_and_never_half_a_success(api: Api) -> None:
    body = {"prompt": "FAIL", "base_model": "tiny"}
    answer = api.client.post("/generate", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "device_lost")
    events = events_of(api.client.post("/generate", json={**body, "stream": True}))
    assert [kind for kind, _ in events] == ["delta", "error"]
    assert events[-1][1]["code"] == "device_lost"
    assert events[-1][1]["instance"] == "/generate"


def test_the_engines_own_faults_are_told_without_internals(api: Api) -> None:
    body = {"prompt": "CRASH", "base_model": "tiny"}
    whole = api.client.post("/generate", json=body)
    streamed = api.client.post("/generate", json={**body, "stream": True})
    assert whole.status_code == 500
    assert events_of(streamed)[-1][1]["code"] == whole.json()["code"] == "internal_error"
    assert "secret" not in whole.text + streamed.text


def test_an_adapter_whose_files_are_gone_is_not_answered(api: Api, digest: str) -> None:
    api.store.delete_adapter(digest)
    asyncio.run(api.engine.unload(digest))
    answer = api.client.post("/generate?adapter=bot", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["code"]) == (404, "adapter_files_missing")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(tmp_path: Path, stream: bool) -> None:
    api = build_api(tmp_path)
    api.engine.gate.clear()
    body = {"prompt": "a b", "stream": stream}
    with live_server(api) as url:
        with pytest.raises(httpx2.ReadTimeout), httpx2.Client(timeout=0.3) as client:
            client.post(f"{url}/generate", json=body)
        wait_until(lambda: len(api.engine.cancelled) == 1, 5, "the request goes on")
        assert api.engine.cancelled == [api.engine.requests[0].request_id]


def test_generating_holds_no_database_connection(tmp_path: Path) -> None:
    api = build_api(tmp_path)
    api.engine.gate.clear()
    with live_server(api) as url, httpx2.Client() as client, ThreadPoolExecutor(3) as pool:
        waiting = [
            pool.submit(client.post, f"{url}/generate", json={"prompt": "a", "stream": stream})
            for stream in (True, False)
        ]
        wait_until(lambda: len(api.engine.requests) == 2, 5, "the requests do not start")
        connections = api.database.engine.pool
        wait_until(lambda: connections.checkedout() == 0, 5, "a connection is held")  # type: ignore[attr-defined]
        api.engine.gate.set()
        assert [future.result().status_code for future in waiting] == [200, 200]


def test_a_slow_stream_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.streaming.KEEP_ALIVE_SECONDS", 0.05)
    api = build_api(tmp_path)
    api.engine.gate.clear()
    body = {"prompt": "a", "stream": True}
    with (
        live_server(api) as url,
        httpx2.Client() as client,
        client.stream("POST", f"{url}/generate", json=body) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        api.engine.gate.set()
        rest = list(lines)
    assert [line for line in rest if line.startswith("event:")][-1] == "event: done"
