"""Text of a growing answer: characters are never split, stop strings never show."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from core.inference.detokenizer import Detokenizer
from core.inference.engine import Delta, Finished, SamplingParams
from core.inference.generation import Answer, TokenChoice
from core.inference.stop_strings import StopStrings
from tests.support.tiny_model import make_tokenizer

EOS = 2
_TOKENIZER = make_tokenizer()


def _decode(ids: list[int]) -> str:
    return str(_TOKENIZER.decode(ids, skip_special_tokens=True))


@given(st.text(min_size=0, max_size=40))
def test_pieces_add_up_to_the_whole_and_no_piece_ends_in_half_a_character(text: str) -> None:
    ids = _TOKENIZER(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(_decode, _TOKENIZER("Grüße 🚀")["input_ids"])
    pieces = [detokenizer.push(token_id) for token_id in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == text
    assert "".join(pieces) + detokenizer.flush() == text


def test_a_character_of_four_bytes_waits_for_the_last_one() -> None:
    ids = _TOKENIZER("🚀", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    detokenizer = Detokenizer(_decode, [])
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🚀"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    ids = _TOKENIZER("a🚀", add_special_tokens=False)["input_ids"][:-1]
    detokenizer = Detokenizer(_decode, [])
    assert "".join(detokenizer.push(token_id) for token_id in ids) == "a"
    assert set(detokenizer.flush()) == {"\ufffd"}
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_text_are_not_kept_for_ever() -> None:
    lead = _TOKENIZER("🚀", add_special_tokens=False)["input_ids"][0]
    detokenizer = Detokenizer(_decode, [])
    assert any(detokenizer.push(lead) for _ in range(40))


def test_special_tokens_do_not_show() -> None:
    ids = _TOKENIZER("a<|im_start|>b", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(_decode, [])
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "b"]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_how_the_text_was_cut_does_not_matter(
    text: str, stops: list[str], lengths: list[int]
) -> None:
    def shown(pieces: list[str]) -> tuple[str, bool]:
        checker, out = StopStrings(stops), ""
        for piece in pieces:
            part, stopped = checker.push(piece)
            out += part
            assert not any(stop in out for stop in stops)
            if stopped:
                return out, True
        return out + checker.flush(), False

    pieces, rest = [], text
    for length in lengths:
        pieces.append(rest[:length])
        rest = rest[length:]
    whole = shown([text])
    assert shown(pieces) == shown(list(text)) == whole
    assert whole[1] == any(stop in text for stop in stops)
    assert text.startswith(whole[0])


_WORDS = st.sampled_from(["a", "b", "é", "🚀", "🚀é", "👩\u200d🔬", "\n\n", " ", "ab", "<|x|>"])


@given(
    st.lists(_WORDS, max_size=14).map("".join),
    st.lists(
        st.lists(_WORDS, min_size=1, max_size=2).map("".join), min_size=1, max_size=4, unique=True
    ),
)
def test_tokens_of_any_text_end_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str]
) -> None:
    ids = _TOKENIZER(text, add_special_tokens=False)["input_ids"]
    shown, finished = play(make_answer(stop=stops), [*ids, EOS])
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert finished.finish_reason == "stop"
    assert (finished.completion_tokens == len(ids) + 1) or ends


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["###", "\nUser:"])
    assert stops.push("Hi #") == ("Hi ", False)
    assert stops.push("#") == ("", False)
    assert stops.push("1 \nUs") == ("##1 ", False)
    assert stops.push("er: what") == ("", True)


def make_answer(**sampling: Any) -> Answer:
    params = SamplingParams(**sampling)
    return Answer(
        0,
        prompt_ids=[],
        decode=_decode,
        token_text=lambda token_id: _TOKENIZER.decode([token_id]),
        end_ids={EOS},
        sampling=params,
        max_new_tokens=params.max_new_tokens,
    )


def play(answer: Answer, ids: list[int]) -> tuple[str, Finished]:
    text = ""
    for token_id in ids:
        for event in answer.push(TokenChoice(token_id)):
            if isinstance(event, Finished):
                return text, event
            assert isinstance(event, Delta)
            text += event.text
    raise AssertionError("the answer did not end")


def test_an_answer_ends_at_its_limit_with_everything_shown() -> None:
    ids = _TOKENIZER("abc#", add_special_tokens=False)["input_ids"]
    text, finished = play(make_answer(max_new_tokens=len(ids), stop=["#!"]), ids)
    assert (text, finished.finish_reason) == ("abc#", "length")
    assert finished.completion_tokens == len(ids)


def test_the_end_token_counts_but_does_not_show() -> None:
    ids = _TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    text, finished = play(make_answer(), [*ids, EOS])
    assert (text, finished.finish_reason) == ("ab", "stop")
    assert finished.completion_tokens == len(ids) + 1


def test_a_stop_string_at_the_limit_is_a_stop() -> None:
    ids = _TOKENIZER("a#!", add_special_tokens=False)["input_ids"]
    text, finished = play(make_answer(max_new_tokens=len(ids), stop=["#!"]), ids)
    assert (text, finished.finish_reason) == ("a", "stop")
