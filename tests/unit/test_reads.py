from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Forbidden, InvalidInput
from core.principal import LOCAL, SCOPES, Principal, expand_scopes
from core.reads import decode_cursor, encode_cursor


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=64))
def test_a_cursor_comes_back_as_its_position(position: str) -> None:
    assert decode_cursor(encode_cursor(position)) == position


@given(st.text(max_size=40))
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    try:
        position = decode_cursor(text)
    except InvalidInput as error:
        assert error.code == "invalid_cursor"  # noqa: PT017 (either outcome is right)
    else:
        assert position.isascii()
        assert position.isprintable()


def test_scopes_imply_others() -> None:
    assert expand_scopes(frozenset({"admin"})) == set(SCOPES)
    assert expand_scopes(frozenset({"train"})) == {"train", "read"}
    assert expand_scopes(frozenset({"read"})) == {"read"}


def test_the_local_user_may_everything_and_a_reader_may_not_train() -> None:
    for scope in SCOPES:
        LOCAL.require(scope)
    with pytest.raises(Forbidden) as caught:
        Principal("p", frozenset({"read"})).require("train")
    assert caught.value.code == "missing_scope"
