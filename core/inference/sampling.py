"""From logits to a token.

Order and meaning of the steps follow `transformers`: repetition penalty, minimum length,
temperature, top-k, top-p. Everything happens on the CPU in float32 with a generator per row, so
that a seed means the same on every device and whatever the neighbours do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from core.errors import TunesmithError
from core.inference.engine import SamplingParams
from core.inference.generation import TokenChoice

# Dividing by less leaves nothing but the best token, and in float32 perhaps not even that.
_GREEDY_BELOW = 1e-6


def penalise_repetition(logits: Tensor, seen_ids: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely (CTRL, Keskar et al., 2019).

    Args:
        logits: Shape (vocabulary,).
        seen_ids: Ids that occurred in prompt or answer.
        penalty: Positive logits are divided by it, negative ones multiplied.
    """
    seen = logits[seen_ids]
    return logits.index_put((seen_ids,), torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Rule out all but the `top_k` best tokens."""
    if top_k >= logits.numel():
        return logits
    worst_kept = torch.topk(logits, top_k).values[-1]
    return logits.masked_fill(logits < worst_kept, float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Rule out all but the smallest set of best tokens that has probability `top_p`.

    Nucleus sampling (Holtzman et al., 2020); the best token always stays.
    """
    ordered, order = torch.sort(logits, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    removed = before >= top_p
    removed[0] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), float("-inf"))


def choose_tokens(
    logits: Tensor, samplers: Sequence[RowSampler]
) -> list[TokenChoice | TunesmithError]:
    """Choose the next token of every row; an error takes the place of its own row alone.

    Args:
        logits: Shape (rows, vocabulary).
        samplers: One for each row.
    """
    logits = logits.to("cpu", torch.float32)
    best, ids = (values.tolist() for values in logits.max(dim=1))
    chosen: list[TokenChoice | TunesmithError] = []
    for row, sampler in enumerate(samplers):
        if sampler.takes_the_best and math.isfinite(best[row]):
            chosen.append(sampler.accept(ids[row]))
            continue
        try:
            chosen.append(sampler.choose(logits[row]))
        except TunesmithError as error:
            chosen.append(error)
    return chosen


class RowSampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: How to choose.
        row: Number of the answer; answer `row` of seed `s` is answer 0 of seed `s + row`.
        prompt_ids: The prompt, which counts for the repetition penalty.
        eos_ids: Tokens ruled out before `min_new_tokens`.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        row: int,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
    ) -> None:
        self._sampling = sampling
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self._seen = set(prompt_ids)
        self._chosen = 0
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + row)

    @property
    def takes_the_best(self) -> bool:
        """Whether the next token is just the one with the highest logit, and nothing is asked."""
        sampling = self._sampling
        return (
            sampling.temperature < _GREEDY_BELOW
            and sampling.repetition_penalty == 1.0
            and self._chosen >= sampling.min_new_tokens
            and sampling.logprobs is None
        )

    def accept(self, token_id: int) -> TokenChoice:
        """Note a token that was chosen elsewhere."""
        self._seen.add(token_id)
        self._chosen += 1
        return TokenChoice(token_id)

    def choose(self, raw: Tensor) -> TokenChoice:
        """Choose the next token.

        Args:
            raw: Logits of shape (vocabulary,), left unchanged.

        Raises:
            TunesmithError: Code `logits_not_finite`.
        """
        raw = raw.to("cpu", torch.float32)
        if not torch.isfinite(raw.max()):
            raise TunesmithError(
                "the model computed values that are not numbers", code="logits_not_finite"
            )
        token_id = self._pick(self._shape(raw))
        choice = self.accept(token_id)
        if self._sampling.logprobs is None:
            return choice
        logprobs = raw.log_softmax(dim=-1)
        best = torch.topk(logprobs, min(self._sampling.logprobs, logprobs.numel()))
        return TokenChoice(
            token_id,
            float(logprobs[token_id]),
            list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )

    def _shape(self, logits: Tensor) -> Tensor:
        if self._sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(self._seen), dtype=torch.long)
            logits = penalise_repetition(logits, seen, self._sampling.repetition_penalty)
        if self._chosen < self._sampling.min_new_tokens:
            logits = logits.index_fill(0, self._eos_ids, float("-inf"))
        return logits

    def _pick(self, logits: Tensor) -> int:
        sampling = self._sampling
        if sampling.temperature < _GREEDY_BELOW:
            return int(logits.argmax())
        # Relative to the best, so that a small temperature cannot overflow.
        logits = (logits - logits.max()) / sampling.temperature
        if sampling.top_k:
            logits = keep_top_k(logits, sampling.top_k)
        if sampling.top_p < 1:
            logits = keep_top_p(logits, sampling.top_p)
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=self._generator)
        return int(drawn)
