"""Decoding one request: its cache, its rows and what each row chose last."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from core.inference.generation import TokenChoice
from core.inference.sampling import RowSampler

# Long prompts are computed in pieces, so that other requests get their turn in between.
PREFILL_TOKENS = 128


class Forward(Protocol):
    """One forward pass with the request's adapter."""

    def __call__(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Return the last position's logits, shape (rows, vocabulary), for ids (rows, tokens)."""
        ...


class Decoding:
    """The rows of one request, which share prompt and adapter and advance together.

    Args:
        forward: Computes logits and extends the cache.
        cache: An empty cache of the model.
        prompt_ids: The prompt.
        samplers: One per answer.
        device: Where input ids go.
    """

    def __init__(
        self,
        forward: Forward,
        cache: Any,
        prompt_ids: Sequence[int],
        samplers: Sequence[RowSampler],
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._prompt = torch.tensor([list(prompt_ids)], device=device)
        self._computed = 0
        self._samplers = samplers
        self._rows = list(range(len(samplers)))
        self._last: list[int] = []
        self._device = device

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, TokenChoice]]:
        """Do one step: a piece of the prompt, or one token for every live row.

        Returns:
            (row, choice) pairs; empty while the prompt is not finished.
        """
        if self._computed < self._prompt.shape[1]:
            logits = self._prefill()
            if logits is None:
                return []
        else:
            logits = self._forward(
                torch.tensor([[token] for token in self._last], device=self._device), self._cache
            )
        choices = [
            (row, self._samplers[row].choose(logits[position]))
            for position, row in enumerate(self._rows)
        ]
        self._last = [choice.token_id for _, choice in choices]
        return choices

    @torch.inference_mode()
    def drop(self, finished: Collection[int]) -> None:
        """Compute these rows no further."""
        kept = [position for position, row in enumerate(self._rows) if row not in finished]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[position] for position in kept]
        self._last = [self._last[position] for position in kept]
        if kept:
            self._cache.batch_select_indices(torch.tensor(kept, device=self._device))

    def _prefill(self) -> Tensor | None:
        piece = self._prompt[:, self._computed : self._computed + PREFILL_TOKENS]
        logits = self._forward(piece, self._cache)
        self._computed += piece.shape[1]
        if self._computed < self._prompt.shape[1]:
            return None
        rows = len(self._samplers)
        if rows > 1:
            self._cache.batch_repeat_interleave(rows)
        return logits.expand(rows, -1)
