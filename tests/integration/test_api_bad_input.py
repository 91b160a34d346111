"""No bad input gets a 5xx: a table of what clients get wrong, and random JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import migrations
from core.inference.engine import SamplingParams
from core.specs import JobSpec
from tests.support.api import ROWS, Api, running_api

JSON = {"Content-Type": "application/json"}
LEAST: dict[str, Any] = {"base_model": "tiny", "rows": ROWS}
PROMPT: dict[str, Any] = {"prompt": "a"}


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
)
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Postgres refuses texts and numbers that SQLite takes, so both see all of this."""
    with ExitStack() as stack:
        url = ""
        if request.param == "postgres":
            server = request.getfixturevalue("postgres_server")
            url = stack.enter_context(server.empty_database())
            migrations.upgrade(url)
        root = tmp_path_factory.mktemp("bad-input")
        yield stack.enter_context(running_api(root, max_request_bytes=100_000, database_url=url))


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({**LEAST, "base_modle": "tiny"}, "unknown_field", "base_modle"),
        ({**LEAST, "lora": {"rank": 4}}, "unknown_field", "lora.rank"),
        ({**LEAST, "rows": ROWS, "dataset": "file-x"}, "invalid_request", None),
        ({"base_model": "tiny"}, "invalid_request", None),
        ({"rows": ROWS}, "invalid_request", "base_model"),
        ({**LEAST, "rows": []}, "invalid_request", None),
        ({**LEAST, "rows": [1]}, "invalid_request", "rows.0"),
        ({**LEAST, "rows": "x"}, "invalid_request", "rows"),
        ({**LEAST, "rows": [{"a": 1}]}, "unknown_format", None),
        ({**LEAST, "rows": [ROWS[0], {"messages": []}]}, "invalid_dataset", "messages"),
        ({**LEAST, "adapter": "Not A Name"}, "invalid_request", "adapter"),
        ({**LEAST, "adapter": "a" * 64}, "invalid_request", "adapter"),
        ({**LEAST, "adapter": "bot\n"}, "invalid_request", "adapter"),
        ({**LEAST, "base_model": "absent"}, "unknown_base_model", "base_model"),
        ({"base_model": "tiny", "dataset": "file-none"}, "unknown_dataset", "dataset"),
        ({**LEAST, "lora": {"r": 0}}, "invalid_request", "lora.r"),
        ({**LEAST, "lora": {"r": 10**400}}, "invalid_request", "lora.r"),
        ({**LEAST, "lora": {"r": 1.5}}, "invalid_request", "lora.r"),
        ({**LEAST, "lora": None}, "invalid_request", "lora"),
        (
            {**LEAST, "lora": {"target_modules": ["q_prj"]}},
            "unknown_target_module",
            "lora.target_modules",
        ),
        (
            {**LEAST, "lora": {"target_modules": [".*"]}},
            "invalid_request",
            "lora.target_modules",
        ),
        ({**LEAST, "training": {"epochs": -1}}, "invalid_request", "training.epochs"),
        ({**LEAST, "method": {"type": "magic"}}, "invalid_request", "method.type"),
        ({**LEAST, "metadata": {"a": 1}}, "invalid_request", "metadata.a"),
        ({**LEAST, "metadata": {str(n): "" for n in range(17)}}, "invalid_request", "metadata"),
        ({**LEAST, "metadata": {"a": "x\0"}}, "invalid_text", "metadata.a"),
        ({**LEAST, "metadata": {"a": "\ud800"}}, "invalid_text", "metadata.a"),
        ({**LEAST, "priority": 10**30}, "invalid_request", "priority"),
        ([], "invalid_request", None),
        ("text", "invalid_request", None),
        (3, "invalid_request", None),
        (None, "invalid_request", None),
    ],
)
def test_a_spec_that_cannot_run_is_refused_with_its_field(
    api: Api, body: Any, code: str, field: str | None
) -> None:
    answer = api.client.post("/jobs", content=json.dumps(body), headers=JSON)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code), problem
    assert problem.get("field") == field
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "invalid_request", None),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_request", None),
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": 3}, "invalid_request", "prompt"),
        ({"prompt": "a\0"}, "invalid_text", "prompt"),
        ({"prompt": "\udfff"}, "invalid_text", "prompt"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "invalid_request", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": "a", "nmae": "b"}]},
            "unknown_field",
            "messages.0.nmae",
        ),
        ({**PROMPT, "max_tokens": 3}, "unknown_field", "max_tokens"),
        ({**PROMPT, "max_new_tokens": 0}, "invalid_request", "max_new_tokens"),
        ({**PROMPT, "max_new_tokens": 1, "min_new_tokens": 2}, "invalid_request", None),
        ({**PROMPT, "temperature": -0.1}, "invalid_request", "temperature"),
        ({**PROMPT, "temperature": "hot"}, "invalid_request", "temperature"),
        ({**PROMPT, "top_p": 0}, "invalid_request", "top_p"),
        ({**PROMPT, "seed": 2**64}, "invalid_request", "seed"),
        ({**PROMPT, "n": 17}, "invalid_request", "n"),
        ({**PROMPT, "stop": [""]}, "invalid_request", "stop.0"),
        ({**PROMPT, "stop": "x"}, "invalid_request", "stop"),
        ({**PROMPT, "stream": "perhaps"}, "invalid_request", "stream"),
        ({"prompt": "long " * 600}, "context_length_exceeded", "prompt"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_its_field(
    api: Api, body: Any, code: str, field: str | None
) -> None:
    for stream in ({}, {"stream": True}) if "stream" not in body else ({},):
        content = json.dumps({**body, **stream})
        answer = api.client.post("/generate", content=content, headers=JSON)
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (422, code), problem
        assert problem.get("field") == field


@pytest.mark.parametrize("path", ["/jobs", "/generate"])
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"a": 1,}',
        b'{"a": "\x01"}',
        b"\xff\xfe",
        b'{"a": "\xc3"}',
        b"[" * 100_000,
        b'{"a": ' * 5000 + b"1" + b"}" * 5000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b"{} {}",
        b"\0",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_json_is_a_400_with_a_reason(api: Api, path: str, content: bytes) -> None:
    answer = api.client.post(path, content=content, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json"), answer.text
    assert answer.json()["detail"]


def test_broken_json_names_line_and_position(api: Api) -> None:
    answer = api.client.post("/jobs", content=b'{\n"base_model": }', headers=JSON).json()
    assert (answer["line"], answer["errors"][0]["position"]) == (2, 16)


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
def test_json_without_its_content_type_is_not_guessed(api: Api, headers: dict[str, str]) -> None:
    content = json.dumps(LEAST).encode()
    answer = api.client.post("/jobs", content=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "application/json" in answer.json()["hint"]


def test_a_missing_body_is_said_to_be_missing(api: Api) -> None:
    answer = api.client.post("/jobs", headers=JSON)
    assert (answer.status_code, answer.json()["detail"]) == (422, "the body is missing")


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_body_above_the_limit_is_a_413(api: Api, announced: bool) -> None:
    content = json.dumps({**LEAST, "metadata": {"a": "x" * 100_000}}).encode()
    answer = api.client.post(
        "/jobs", content=content if announced else iter([content]), headers=JSON
    )
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_path"),
        ("GET", "/jobs/", 404, "unknown_path"),
        ("PATCH", "/jobs", 405, "method_not_allowed"),
        ("BREW", "/jobs", 405, "method_not_allowed"),
        ("GET", "/jobs/%00", 422, "invalid_text"),
        ("GET", "/jobs?adapter=%00", 422, "invalid_text"),
        ("GET", "/jobs/%ff", 404, "unknown_job"),
        ("GET", "/jobs/" + "x" * 5000, 404, "unknown_job"),
        ("GET", "/jobs?cursor=%21%21", 422, "invalid_cursor"),
        ("GET", "/jobs?cursor=8J-YgA", 422, "invalid_cursor"),
        ("GET", "/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/jobs?limit=9999999999999999999999", 422, "invalid_request"),
        ("GET", "/jobs?status=lost", 422, "invalid_request"),
        ("GET", "/jobs/x/events?after=-1", 422, "invalid_request"),
        ("GET", "/jobs/x/metrics?format=xml", 422, "invalid_request"),
        ("GET", "/adapters/%F0%9F%98%80", 404, "unknown_adapter"),
        ("GET", "/datasets/x/rows?offset=99999999999999", 422, "invalid_request"),
        ("PUT", "/adapters/x/aliases/UPPER", 422, "invalid_request"),
    ],
)
def test_urls_that_mean_nothing_are_refused(
    api: Api, method: str, path: str, status: int, code: str
) -> None:
    answer = api.client.request(method, path, json={"version": 1} if method == "PUT" else None)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    if status == 405:
        assert answer.headers["allow"] == "GET, POST"


@pytest.mark.parametrize("key", ["", "x" * 256, "\x7f", "caf\xe9"])
def test_a_malformed_idempotency_key_is_refused(api: Api, key: str) -> None:
    headers = [(b"idempotency-key", key.encode("latin-1"))]
    answer = api.client.post("/jobs", json=LEAST, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_idempotency_key")


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"word": 1}}, "logit_bias.word"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.text.schema"),
    ],
)
def test_bad_sampling_is_refused(api: Api, sampling: dict[str, Any], field: str) -> None:
    answer = api.client.post("/generate", json={**PROMPT, **sampling})
    assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text


def nasty_json() -> st.SearchStrategy[Any]:
    """Return JSON values with everything that has ever broken a service."""
    texts = st.text() | st.sampled_from(["\0", "\ud800", "a" * 3000, "tiny", "user", "{{ 1/0 }}"])
    numbers = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**309, 1e308, -0.0])
    leaves = st.none() | st.booleans() | numbers | texts

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)

    return st.recursive(leaves, containers, max_leaves=12)


def bodies(least: dict[str, Any], fields: set[str]) -> st.SearchStrategy[Any]:
    """Return bodies that are nearly right: known fields with any values, and any JSON at all."""
    known = st.dictionaries(st.sampled_from(sorted(fields)), nasty_json(), max_size=4)
    return known.map(lambda changes: {**least, **changes}) | nasty_json()


FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NESTED = {"method", "lora", "training", "data", "evaluation"}


@FUZZ
@given(body=bodies(LEAST, set(JobSpec.model_fields)), section=st.sampled_from(sorted(NESTED)),
       inner=nasty_json())  # fmt: skip
def test_no_job_spec_whatsoever_gets_a_5xx(api: Api, body: Any, section: str, inner: Any) -> None:
    candidates = [body, {**LEAST, section: inner}, {**LEAST, "rows": [{"messages": inner}]}]
    for candidate in candidates:
        answer = api.client.post("/jobs", content=json.dumps(candidate), headers=JSON)
        assert answer.status_code < 500, (candidate, answer.text)
        if answer.status_code != 202:
            assert answer.json()["code"]


@FUZZ
@given(body=bodies(PROMPT, {*SamplingParams.model_fields, "prompt", "messages", "base_model",
                            "stream"}),
       adapter=st.text(max_size=20))  # fmt: skip
def test_no_generate_request_whatsoever_gets_a_5xx(api: Api, body: Any, adapter: str) -> None:
    for params in ({}, {"adapter": adapter.encode("utf-8", "replace").decode()}):
        answer = api.client.post("/generate", params=params, content=json.dumps(body), headers=JSON)
        assert answer.status_code < 500, (body, answer.text)
