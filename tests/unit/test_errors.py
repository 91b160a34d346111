from __future__ import annotations

import json

import pytest

from core.errors import Conflict, InvalidInput, TunesmithError, Unavailable, from_wire, to_wire


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput(
            "bad row", code="invalid_dataset", line=3, hint="mend it", errors=[{"line": 3}]
        ),
        Conflict("no", field="adapter"),
        Unavailable("later"),
    ],
)
def test_an_error_survives_the_way_to_another_process(error: TunesmithError) -> None:
    received = from_wire(json.loads(json.dumps(to_wire(error))))
    assert type(received) is type(error)
    assert received.as_dict() == error.as_dict()


def test_an_unknown_kind_is_still_an_error_with_its_code() -> None:
    received = from_wire({"kind": "Exotic", "code": "exotic_thing", "message": "so"})
    assert (type(received), received.code) == (TunesmithError, "exotic_thing")


def test_a_retry_time_survives_the_way() -> None:
    received = from_wire(to_wire(Unavailable("full", retry_after_seconds=7)))
    assert isinstance(received, Unavailable)
    assert received.retry_after_seconds == 7
