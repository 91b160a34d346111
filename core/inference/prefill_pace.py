"""How much of prompts is read beside a step, so that running answers hardly notice."""

from __future__ import annotations

# A step may take this much longer for a prompt that is read beside it; what that really takes
# differs from what was learned.
_STEPS_PER_PIECE = 0.75
# Where no answer waits for its next token, who comes meanwhile waits no longer than this;
_MOST_SECONDS = 0.25
# and no answer waits longer than this for many prompts, unless a step takes longer itself.
_MOST_SECONDS_BESIDE = 0.1
_LEAST_TOKENS = 8
_MOST_TOKENS = 512
_FIRST_TOKENS = 64
_WEIGHT_OF_NEWEST = 0.2


class PrefillPace:
    """Learns how long steps and prompt tokens take, and sizes the pieces by that."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        self._token_seconds: float | None = None

    def tokens(self, *, answers: int, prompts: int) -> int:
        """Return how many prompt tokens to compute in a pass.

        Where prompts outnumber answers, as when many requests come at once, that is as many times
        more: whoever comes first must not hold up all the others.

        Args:
            answers: That are being generated meanwhile.
            prompts: That are being read.
        """
        if self._token_seconds is None or (answers and self._step_seconds is None):
            return _FIRST_TOKENS if answers else _MOST_TOKENS
        seconds = _MOST_SECONDS
        if answers and self._step_seconds is not None:
            piece = _STEPS_PER_PIECE * self._step_seconds
            seconds = max(piece, min(piece * prompts / answers, _MOST_SECONDS_BESIDE))
        return min(max(int(seconds / self._token_seconds), _LEAST_TOKENS), _MOST_TOKENS)

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
        if answers and self._step_seconds is None:
            return
        if prompt_tokens < _LEAST_TOKENS and self._token_seconds is not None:
            # The rest of a prompt: the pass costs a step, however few tokens that has.
            return
        # The weights are read once, for few tokens as for many; a step is little else.
        seconds -= min(self._step_seconds or 0.0, seconds / 2)
        self._token_seconds = _averaged(self._token_seconds, seconds / prompt_tokens)


def _averaged(known: float | None, new: float) -> float:
    return new if known is None else known + _WEIGHT_OF_NEWEST * (new - known)
