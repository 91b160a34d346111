"""What a client is told about an invalid request: fields, codes, hints; and what text is refused.

Turns the validator's findings into one `InvalidInput`. Never repeats the values that were sent:
they may be prompts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any, get_args

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from core.errors import InvalidInput

_MAX_ERRORS = 50
_CODES_OF_THEIR_OWN = frozenset({"unknown_field", "promotion_needs_evidence"})
_PLACES = ("body", "query", "path", "header", "cookie")
# What JSON writes where a text or number would be refused; only then is the body walked.
_SUSPECT = re.compile(rb"\\u0000|\\u[dD][89a-fA-F]|NaN|Infinity|[eE]\+?\d{3}|\d{300}")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
# Linked to its parent: the whole path of each of a million leaves would not fit in memory.
_Place = tuple[Any, str | int] | None


def describe_invalid_request(error: RequestValidationError, route: Any) -> InvalidInput:
    """Return the error to answer with.

    Args:
        error: The validator's findings.
        route: The route whose body model knows the field names; may be `None`.
    """
    findings = list(error.errors())
    for finding in findings:
        if finding["type"] == "json_invalid":
            return _broken_json(finding, error.body)

    model = _body_model(route)
    described = [_describe(finding, model) for finding in findings[:_MAX_ERRORS]]
    # A misspelt field often causes a second finding, that the right one is missing.
    described.sort(key=lambda entry: entry["code"] != "unknown_field")
    first = described[0]
    place = f"{first['field']}: " if first["field"] is not None else ""
    return InvalidInput(
        place + first["message"],
        code=first["code"] if first["code"] in _CODES_OF_THEIR_OWN else "invalid_request",
        field=first["field"],
        hint=first.get("hint"),
        errors=described,
    )


def check_json_values(value: Any, raw: bytes) -> None:
    """Refuse texts and numbers that no store and no tokenizer can take.

    Args:
        value: The parsed body.
        raw: The bytes it was parsed from.

    Raises:
        InvalidInput: Code `invalid_text` (NUL, lone surrogate) or `invalid_number`.
    """
    if not _SUSPECT.search(raw):
        return
    for place, leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise InvalidInput(
                "numbers must be finite", code="invalid_number", field=_dotted(place)
            )
        if isinstance(leaf, str) and _UNSTORABLE.search(leaf):
            check_text(leaf, _dotted(place))


def check_text(text: str, field: str | None) -> None:
    """Refuse a text with a NUL character or a lone surrogate.

    Raises:
        InvalidInput: Code `invalid_text`.
    """
    if "\0" in text:
        raise InvalidInput("a text holds a NUL character", code="invalid_text", field=field)
    if _UNSTORABLE.search(text):
        raise InvalidInput("a text holds a lone surrogate", code="invalid_text", field=field)


def _broken_json(finding: Any, document: Any) -> InvalidInput:
    position = finding["loc"][-1]
    reason = finding.get("ctx", {}).get("error", "syntax error")
    line = document.count("\n", 0, position) + 1 if isinstance(document, str) else None
    return InvalidInput(
        f"the body is not JSON: {reason} at character {position}",
        code="invalid_json",
        line=line,
        errors=[{"position": position, "message": reason}],
    )


def _describe(finding: Any, model: type[BaseModel] | None) -> dict[str, Any]:
    path = _field_path(finding["loc"])
    if finding["type"] in ("union_tag_invalid", "union_tag_not_found"):
        # The field at fault is the one that tells the members of the union apart.
        path.append(finding["ctx"]["discriminator"].strip("'"))
    code, message = finding["type"], finding["msg"].removeprefix("Value error, ")
    entry: dict[str, Any] = {"field": ".".join(map(str, path)) or None}
    if code == "extra_forbidden":
        entry |= {"message": "there is no such field", "code": "unknown_field"}
        hint = _did_you_mean(path, model)
    elif code in ("model_attributes_type", "model_type") and not path:
        entry |= {"message": "the body must be a JSON object", "code": "not_an_object"}
        hint = "Send a JSON object with Content-Type: application/json."
    elif code == "missing" and not path:
        entry |= {"message": "the body is missing", "code": "missing"}
        hint = "Send a JSON object with Content-Type: application/json."
    else:
        entry |= {"message": message[:500], "code": code}
        hint = None
    return entry if hint is None else entry | {"hint": hint}


def _field_path(location: tuple[Any, ...]) -> list[Any]:
    parts = list(location[1:] if location and location[0] in _PLACES else location)
    # The validator names union branches such as `list[str]` like fields.
    return [part for part in parts if not (isinstance(part, str) and "[" in part and "]" in part)]


def _did_you_mean(path: list[Any], model: type[BaseModel] | None) -> str | None:
    for part in path[:-1]:
        if model is None:
            return None
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field else None
    if model is None:
        return None
    names = sorted(model.model_fields)
    close = difflib.get_close_matches(str(path[-1])[:100], names, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known fields: {', '.join(names)}."


def _body_model(route: Any) -> type[BaseModel] | None:
    field = getattr(route, "body_field", None)
    return _model_in(field.field_info.annotation) if field is not None else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _leaves(value: Any) -> Iterator[tuple[_Place, Any]]:
    """Yield every scalar and every key with its place, without recursion."""
    pending: list[tuple[_Place, Any]] = [(None, value)]
    while pending:
        place, item = pending.pop()
        if isinstance(item, dict):
            for key, child in item.items():
                yield place, key
                pending.append(((place, key), child))
        elif isinstance(item, list):
            pending.extend(((place, index), child) for index, child in enumerate(item))
        else:
            yield place, item


def _dotted(place: _Place) -> str | None:
    parts: list[str] = []
    while place is not None:
        place, key = place
        parts.append(str(key))
    return ".".join(reversed(parts))[:200] or None
