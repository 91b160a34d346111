"""How much of prompts is read beside a step, so that running answers hardly notice."""

from __future__ import annotations

# A step may take as much longer for the prompts that are read beside it.
_STEPS_PER_PIECE = 1.5
_LEAST_TOKENS = 16
_MOST_TOKENS = 512
_FIRST_TOKENS = 64
_WEIGHT_OF_NEWEST = 0.2


class PrefillPace:
    """Learns how long steps and prompt tokens take, and sizes the pieces by that."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        self._token_seconds: float | None = None

    def tokens(self, *, others_wait: bool) -> int:
        """Return how many prompt tokens to compute in a pass.

        Args:
            others_wait: Whether answers are being generated meanwhile.
        """
        if not others_wait:
            return _MOST_TOKENS
        if self._step_seconds is None or self._token_seconds is None:
            return _FIRST_TOKENS
        tokens = int(_STEPS_PER_PIECE * self._step_seconds / self._token_seconds)
        return min(max(tokens, _LEAST_TOKENS), _MOST_TOKENS)

    def note_pass(self, seconds: float, *, answers: int, prompt_tokens: int) -> None:
        """Learn from a pass.

        Args:
            seconds: How long it took.
            answers: Answers that got a token beside prompts.
            prompt_tokens: Tokens of prompts in it.
        """
        if not prompt_tokens:
            self._step_seconds = _averaged(self._step_seconds, seconds)
            return
        if answers:
            if self._step_seconds is None:
                return
            seconds -= min(self._step_seconds, seconds / 2)
        self._token_seconds = _averaged(self._token_seconds, seconds / prompt_tokens)


def _averaged(known: float | None, new: float) -> float:
    return new if known is None else known + _WEIGHT_OF_NEWEST * (new - known)
