"""From logits to a token.

The steps, in this order: repetition penalty; presence and frequency penalty; logit bias; tokens
ruled out by `response_format`; end tokens ruled out by `min_new_tokens`; temperature; top-k; top-p;
min-p; the draw. The first and the last four are those of `transformers`, in its order.

Everything happens on the CPU in float32 with a generator per row, which gives one number for each
token that is drawn, so that a seed means the same on every device and whatever the neighbours do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from core.errors import TunesmithError
from core.inference.drawing import draw, draw_from_all, find_candidates, top_k_floors
from core.inference.engine import SamplingParams
from core.inference.generation import TokenChoice
from core.inference.grammar import Matcher

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


def penalise_presence(
    logits: Tensor, counts: dict[int, int], presence: float, frequency: float
) -> Tensor:
    """Lower the logits of tokens that the answer has, once and for each time (OpenAI).

    Args:
        logits: Shape (vocabulary,).
        counts: How often the answer has each token.
        presence: Taken off once.
        frequency: Taken off as often as the token occurred.
    """
    ids = torch.tensor(list(counts), dtype=torch.long)
    times = torch.tensor(list(counts.values()), dtype=logits.dtype)
    return logits.index_add(0, ids, -(presence + frequency * times))


def choose_tokens(
    logits: Tensor, samplers: Sequence[RowSampler]
) -> list[TokenChoice | TunesmithError]:
    """Choose the next token of every row; an error takes the place of its own row alone.

    Args:
        logits: Shape (rows, vocabulary).
        samplers: One for each row.
    """
    logits = logits.to("cpu", torch.float32)
    # NumPy finds the best of a row in a tenth of the time that torch takes; NaN counts as best.
    ids = logits.numpy().argmax(axis=1).tolist()
    best = logits[range(len(ids)), ids].tolist()
    floors = _floors(logits, samplers)
    chosen: list[TokenChoice | TunesmithError] = []
    for row, sampler in enumerate(samplers):
        if sampler.takes_the_best(ids[row]) and math.isfinite(best[row]):
            chosen.append(sampler.accept(ids[row]))
            continue
        try:
            chosen.append(sampler.choose(logits[row], floors.get(row)))
        except TunesmithError as error:
            chosen.append(error)
    return chosen


def _floors(logits: Tensor, samplers: Sequence[RowSampler]) -> dict[int, float]:
    """Return `top_k_floors` by row, computed at once for all rows with the same top-k."""
    rows_of: dict[int, list[int]] = {}
    for row, sampler in enumerate(samplers):
        if 0 < sampler.plain_top_k < logits.shape[1]:
            rows_of.setdefault(sampler.plain_top_k, []).append(row)
    floors: dict[int, float] = {}
    for top_k, rows in rows_of.items():
        these = logits if len(rows) == len(samplers) else logits[rows]
        floors.update(zip(rows, top_k_floors(these, top_k).tolist(), strict=True))
    return floors


class RowSampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: How to choose.
        row: Number of the answer; answer `row` of seed `s` is answer 0 of seed `s + row`.
        prompt_ids: The prompt, which counts for the repetition penalty.
        end_ids: Tokens that end the answer, ruled out before `min_new_tokens`.
        matcher: Says which tokens `response_format` allows; this answer's own.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        row: int,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        matcher: Matcher | None = None,
    ) -> None:
        self._sampling = sampling
        self._end_ids = frozenset(end_ids)
        self._seen = set(prompt_ids)
        self._counts: dict[int, int] = {}
        self._chosen = 0
        self._matcher = matcher
        self._bias_ids = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._shapes = bool(
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.logit_bias
            or matcher is not None
        )
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + row)

    def takes_the_best(self, token_id: int) -> bool:
        """Tell whether the token with the highest logit is the next one, and nothing else asked."""
        if not self._is_greedy or self._shapes or self._sampling.logprobs is not None:
            return False
        # What `min_new_tokens` rules out matters only where it is the best.
        return self._may_end or token_id not in self._end_ids

    @property
    def plain_top_k(self) -> int:
        """The top-k that applies to the logits as they are; 0 if none does."""
        return self._sampling.top_k if self._is_plain and not self._is_greedy else 0

    @property
    def _is_greedy(self) -> bool:
        return self._sampling.temperature < _GREEDY_BELOW

    @property
    def _is_plain(self) -> bool:
        return not self._shapes and self._may_end

    @property
    def _may_end(self) -> bool:
        return self._chosen >= self._sampling.min_new_tokens

    def accept(self, token_id: int) -> TokenChoice:
        """Note a token that was chosen elsewhere."""
        self._seen.add(token_id)
        self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self._chosen += 1
        if self._matcher is not None:
            self._matcher.accept(token_id)
        return TokenChoice(token_id)

    def choose(self, raw: Tensor, floor: float | None = None) -> TokenChoice:
        """Choose the next token.

        Args:
            raw: Logits of shape (vocabulary,), left unchanged.
            floor: The row's value of `top_k_floors` for `plain_top_k`, if it is known.

        Raises:
            TunesmithError: Code `logits_not_finite`, or those of `Matcher.allowed`.
        """
        raw = raw.to("cpu", torch.float32)
        if not torch.isfinite(raw.max()):
            raise TunesmithError(
                "the model computed values that are not numbers", code="logits_not_finite"
            )
        shaped = raw if self._is_plain else self._shape(raw)
        choice = self.accept(self._pick(shaped, floor))
        if self._sampling.logprobs is None:
            return choice
        logprobs = raw.log_softmax(dim=-1)
        best = torch.topk(logprobs, min(self._sampling.logprobs, logprobs.numel()))
        return TokenChoice(
            choice.token_id,
            float(logprobs[choice.token_id]),
            list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )

    def _shape(self, logits: Tensor) -> Tensor:
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(list(self._seen), dtype=torch.long)
            logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            logits = penalise_presence(
                logits, self._counts, sampling.presence_penalty, sampling.frequency_penalty
            )
        if sampling.logit_bias:
            logits = logits.index_add(0, self._bias_ids, self._bias)
        if self._matcher is not None:
            logits = self._matcher.allow_only(logits)
        if not self._may_end:
            ends = torch.tensor(sorted(self._end_ids), dtype=torch.long)
            waiting = logits.index_fill(0, ends, float("-inf"))
            # What is complete and cannot go on ends, however short it is.
            logits = waiting if self._matcher is None or _possible(waiting) else logits
        return logits

    def _pick(self, logits: Tensor, floor: float | None) -> int:
        sampling = self._sampling
        if self._is_greedy:
            return int(logits.argmax())
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
            return draw_from_all(logits, sampling.temperature, uniform)
        candidates = find_candidates(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            floor=floor,
        )
        return draw(candidates, uniform)


def _possible(logits: Tensor) -> bool:
    return bool(logits.max() > float("-inf"))
