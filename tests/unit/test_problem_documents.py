from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError

from core import errors as kinds
from core.errors import InvalidInput, TunesmithError
from core.specs import JobSpec
from service.errors import headers_of, problem, problem_response, status_of
from service.validation import check_json_values, describe_invalid_request


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rank: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner | None = None
    many: list[Inner] = []


class Route:
    """As much of a route as the description of an error looks at."""

    class body_field:  # noqa: N801
        class field_info:  # noqa: N801
            annotation: Any = Outer


def described(body: Any, model: type[BaseModel] = Outer) -> InvalidInput:
    route = Route()
    route.body_field.field_info.annotation = model
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    findings = [{**finding, "loc": ("body", *finding["loc"])} for finding in raised.value.errors()]
    return describe_invalid_request(RequestValidationError(findings, body=body), route)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (kinds.InvalidInput("x"), 422),
        (kinds.TooLarge("x"), 413),
        (kinds.Unauthorized("x"), 401),
        (kinds.Forbidden("x"), 403),
        (kinds.NotFound("x"), 404),
        (kinds.Conflict("x"), 409),
        (kinds.Unavailable("x"), 503),
        (kinds.Unavailable("x", code="engine_full"), 429),
        (kinds.InvalidInput("x", code="invalid_json"), 400),
        (kinds.TrainingFailed("x"), 500),
        (kinds.LeaseLost("x"), 500),
        (kinds.TunesmithError("x"), 500),
    ],
)
def test_every_kind_of_error_has_its_status(error: TunesmithError, status: int) -> None:
    assert status_of(error) == status
    assert problem(error, instance="/x", request_id="r")["status"] == status


def test_a_problem_has_the_members_that_the_error_has_and_no_others() -> None:
    error = InvalidInput("wrong", code="c", field="f", line=3, hint="h", errors=[{"line": 3}])
    assert problem(error, instance="/x", request_id="r") == {
        "type": "urn:tunesmith:problem:c",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "wrong",
        "code": "c",
        "field": "f",
        "line": 3,
        "hint": "h",
        "errors": [{"line": 3}],
        "instance": "/x",
        "request_id": "r",
    }
    assert "line" not in problem(InvalidInput("x"), instance="/x", request_id="r")


def test_headers_tell_how_to_authenticate_and_when_to_retry() -> None:
    assert headers_of(kinds.Unauthorized("x"))["WWW-Authenticate"].startswith("Bearer")
    assert headers_of(kinds.Unavailable("x", retry_after_seconds=9)) == {"Retry-After": "9"}
    assert headers_of(kinds.NotFound("x")) == {}


def test_a_problem_that_quotes_unencodable_text_is_still_json() -> None:
    response = problem_response(InvalidInput("a \ud800 b"), instance="/\udcff", request_id=None)
    assert json.loads(bytes(response.body))["detail"] == "a \ud800 b"


def test_a_misspelt_field_comes_first_with_the_right_name() -> None:
    error = described({"nane": "x"})
    assert (error.code, error.field) == ("unknown_field", "nane")
    assert error.hint == "Did you mean 'name'?"
    assert [(entry["field"], entry["code"]) for entry in error.errors] == [
        ("nane", "unknown_field"),
        ("name", "missing"),
    ]


@pytest.mark.parametrize(
    ("body", "field", "hint"),
    [
        ({"name": "x", "inner": {"rnk": 1}}, "inner.rnk", "Did you mean 'rank'?"),
        ({"name": "x", "many": [{}, {"rnk": 1}]}, "many.1.rnk", "Did you mean 'rank'?"),
        ({"name": "x", "zzzz": 1}, "zzzz", "Known fields: inner, many, name."),
    ],
)
def test_unknown_fields_are_named_by_their_path(
    body: dict[str, Any], field: str, hint: str
) -> None:
    error = described(body)
    assert (error.code, error.field, error.hint) == ("unknown_field", field, hint)


def test_values_are_never_repeated() -> None:
    error = described({"name": ["secret"], "inner": "secret", "many": {"secret": 1}})
    assert error.code == "invalid_request"
    assert "secret" not in json.dumps(error.as_dict())


def test_branches_of_a_union_do_not_show_in_the_path() -> None:
    body = {"base_model": "m", "dataset": "d", "lora": {"target_modules": 3}}
    error = described(body, JobSpec)
    assert {entry["field"] for entry in error.errors} == {"lora.target_modules"}


def test_a_rule_of_the_whole_body_has_no_field() -> None:
    error = described({"base_model": "m"}, JobSpec)
    assert error.field is None
    assert error.message == "give one of 'dataset', 'datasets' or 'rows'"


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ('{"a": ["b", {"c": "x\\u0000"}]}', "invalid_text", "a.1.c"),
        ('{"a": "\\uD83D"}', "invalid_text", "a"),
        ('{"\\udfff": 1}', "invalid_text", None),
        ('{"a": NaN}', "invalid_number", "a"),
        ('{"a": [-Infinity]}', "invalid_number", "a.0"),
        ('{"a": 1e999}', "invalid_number", "a"),
        ('{"a": 1E+400}', "invalid_number", "a"),
        ('{"a": ' + "9" * 400 + ".0}", "invalid_number", "a"),
    ],
)
def test_texts_and_numbers_that_nothing_can_store_are_refused(
    text: str, code: str, field: str | None
) -> None:
    with pytest.raises(InvalidInput) as raised:
        check_json_values(json.loads(text), text.encode())
    assert (raised.value.code, raised.value.field) == (code, field)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "\\ud83d\\ude00 NaN Infinity \\\\u0000", "b": [1e10, 1.5, -3, true, null]}',
        '"' + "9" * 400 + '"',
        "9" * 400,
    ],
)
def test_what_only_looks_like_it_passes(text: str) -> None:
    check_json_values(json.loads(text), text.encode())
