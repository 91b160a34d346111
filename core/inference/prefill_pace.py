"""How much of a prompt is read between two steps, so that running answers hardly notice."""

from __future__ import annotations

# A piece may take as long as this many steps; the gap that others see is one step more.
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

    def piece(self, *, others_wait: bool) -> int:
        """Return how many prompt tokens to compute at once.

        Args:
            others_wait: Whether answers are being generated meanwhile.
        """
        if not others_wait:
            return _MOST_TOKENS
        if self._step_seconds is None or self._token_seconds is None:
            return _FIRST_TOKENS
        tokens = int(_STEPS_PER_PIECE * self._step_seconds / self._token_seconds)
        return min(max(tokens, _LEAST_TOKENS), _MOST_TOKENS)

    def note_step(self, seconds: float) -> None:
        """Learn how long a step took."""
        self._step_seconds = _averaged(self._step_seconds, seconds)

    def note_piece(self, tokens: int, seconds: float) -> None:
        """Learn how long a piece of a prompt took."""
        self._token_seconds = _averaged(self._token_seconds, seconds / tokens)


def _averaged(known: float | None, new: float) -> float:
    return new if known is None else known + _WEIGHT_OF_NEWEST * (new - known)
