"""Read back what a data set trains: the answers, the tokens that end them, and nothing else.

Works from the token ids and labels alone, so that it would notice a mistake of the rendering, and a
tokenizer that cannot spell a text.
"""

from __future__ import annotations

from typing import Any

from core.data.pairs import PreferencePair
from core.data.rendering import IGNORED_LABEL, Span, TrainingRow
from core.data.schema import Example
from core.data.templates import (
    PINNED_DATE,
    asks_for_date,
    special_tokens,
    uses_fallback,
)
from core.errors import InvalidInput

# Some tokenizers decode to words with blanks between them, whatever stood there.
_PROBE = "a b: c.\n d"


class TrainedTextCheck:
    """Checks the rows of one data set.

    Args:
        tokenizer: With which they were rendered.

    Attributes:
        added: What the chat template puts before an answer and the model thus learns to write.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        self._ends = tuple(special_tokens(tokenizer))
        self._keeps_blanks = _PROBE in self._decode(tokenizer(_PROBE)["input_ids"])
        self._conversations = False
        self.added = ""

    def check(self, example: Example, rendered: TrainingRow | PreferencePair) -> None:
        """Decode a row's trained positions and compare them with its answers.

        Raises:
            InvalidInput: Code `trained_text_differs`.
        """
        self._conversations |= example.messages is not None
        if isinstance(rendered, PreferencePair):
            self._compare([rendered.chosen_ids], rendered.text, rendered.spans, example)
            rejected = example.rejected or example
            ids, spans = rendered.rejected_ids, rendered.rejected_spans
            self._compare([ids], rendered.rejected_text, spans, rejected)
        elif example.whole:
            runs = _trained_runs(rendered)
            if len(runs) != 1:
                raise _differs("parts of the row", rendered.text)
            self._expect(runs[0], rendered.text)
        else:
            self._compare(_trained_runs(rendered), rendered.text, rendered.spans, example)

    def notes(self) -> list[tuple[str, str]]:
        """Return code and sentence of what the template does that a user should know."""
        if not self._conversations:
            return []
        notes = {
            "chatml_fallback": uses_fallback(self._tokenizer)
            and "the base model has no chat template; conversations are written as ChatML, without "
            f"new tokens, and answers end with {self._tokenizer.eos_token!r}",
            "template_dated": asks_for_date(self._tokenizer)
            and "the chat template writes the current date; it is always told "
            f"{PINNED_DATE:%Y-%m-%d}, in training and in serving",
            "template_adds_text": self.added
            and f"the chat template puts {self.added[:80]!r} before answers, which is learnt with "
            "them",
        }
        return [(code, sentence) for code, sentence in notes.items() if sentence]

    def _answers(self, example: Example) -> list[tuple[str, bool]]:
        """Return the text of each trained answer, and whether it calls tools."""
        if example.messages is None:
            return [(example.completion.removesuffix(self._tokenizer.eos_token), False)]
        return [
            (turn["content"], bool(turn.get("tool_calls")))
            for index, turn in enumerate(example.messages)
            if turn["role"] == "assistant" and (example.trained is None or index in example.trained)
        ]

    def _compare(
        self, runs: list[list[int]], text: str, spans: list[Span], example: Example
    ) -> None:
        answers = self._answers(example)
        if not len(runs) == len(spans) == len(answers):
            raise _differs(f"{len(runs)} parts", f"{len(answers)} answers")
        for ids, span, (content, calls) in zip(runs, spans, answers, strict=True):
            written = text[span.start : span.end]
            self._expect(ids, written)
            expected = f"{content} and its end token"
            if calls:
                # Calls are spelled as the template likes; that they are there is seen elsewhere.
                if content.strip() not in written or not written.endswith(self._ends):
                    raise _differs(written, expected)
                continue
            head, found, tail = written.rpartition(content)
            if not found:
                head, found, tail = written.rpartition(content.strip())
            if not found or tail.strip() not in self._ends:
                raise _differs(written, expected)
            self.added = self.added or head

    def _expect(self, ids: list[int], text: str) -> None:
        decoded = self._decode(ids)
        if decoded == text:
            return
        said, wanted = self._normalise(decoded), self._normalise(text)
        if not self._keeps_blanks:
            said, wanted = "".join(said.split()), "".join(wanted.split())
        # Tokenizers that mark the beginning of words do not tell a blank at the start of a text.
        if said.lstrip(" ") != wanted.lstrip(" "):
            raise _differs(decoded, text)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _normalise(self, text: str) -> str:
        """Return a text as the tokenizer sees it, such as in composed Unicode."""
        if self._normalizer is None:
            return text
        normal = self._normalizer.normalize_str(text)
        # Some write blanks as a letter of their own.
        return str(normal).replace("\u2581", " ")


def _trained_runs(row: TrainingRow) -> list[list[int]]:
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label == IGNORED_LABEL:
            inside = False
            continue
        if not inside:
            runs.append([])
        inside = True
        if label != token:
            raise _differs(f"token {label}", f"token {token}")
        runs[-1].append(token)
    return runs


def _differs(trained: str, expected: str) -> InvalidInput:
    return InvalidInput(
        f"the row would train {_shorten(trained)} instead of {_shorten(expected)}",
        code="trained_text_differs",
        hint="The tokenizer cannot spell this text, or the chat template changes it.",
    )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
