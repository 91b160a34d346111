"""Tokens to text, piece by piece, without splitting a character.

A token's text depends on its neighbours (bytes of one character, spaces that a decoder strips), so
the new text is the difference of two decodings of a short window: the tokens already shown, and
those with the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# Tokens of the prompt that give the first new token its context.
_CONTEXT_TOKENS = 6
# A character is at most four bytes, so at most four tokens. Bytes that do not become text after
# many more never will; they are shown as replacement characters rather than kept for ever.
_MAX_PENDING_TOKENS = 16


class Detokenizer:
    """Decodes one answer incrementally.

    Args:
        decode: Turns ids into text, special tokens left out.
        prompt_ids: The prompt; its end is the context of the first token, its text is not shown.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._shown = len(self._window)

    def push(self, token_id: int) -> str:
        """Take one token; return the text it completes, empty while a character is incomplete."""
        self._window.append(token_id)
        return self._advance(final=len(self._window) - self._shown >= _MAX_PENDING_TOKENS)

    def flush(self) -> str:
        """Return the text of tokens held back, incomplete characters as replacement characters."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._window[: self._shown])
        after = self._decode(self._window)
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        text = after[len(before) :]
        if text or final:
            # The tokens just shown are context enough for the next ones.
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
        return text
