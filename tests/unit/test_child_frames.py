from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.child import MAX_FRAME_BYTES, FrameDecoder, encode_frame

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4), st.data())
def test_frames_survive_any_cutting_of_the_stream(
    frames: list[dict[str, object]], data: st.DataObject
) -> None:
    stream = b"".join(encode_frame(frame) for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder = FrameDecoder()
    decoded = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoded.extend(decoder.feed(stream[start:end]))
    assert decoded == frames


def test_a_frame_is_one_line_whatever_it_holds() -> None:
    encoded = encode_frame({"text": "a\nb\r\u2028c"})
    assert encoded.count(b"\n") == 1
    assert encoded.endswith(b"\n")
    assert json.loads(encoded) == {"text": "a\nb\r\u2028c"}


@pytest.mark.parametrize("stream", [b"Traceback\n", b"[1]\n", b"\n", b"x" * (MAX_FRAME_BYTES + 1)])
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (json's own message varies)
        list(FrameDecoder().feed(stream))
