"""From logits to a token.

The steps, in this order: repetition penalty; presence and frequency penalty; logit bias; tokens
ruled out by `response_format`; end tokens ruled out by `min_new_tokens`; temperature; top-k; top-p;
min-p; the draw. The first and the last four are those of `transformers`, in its order.

Everything happens on the CPU, with NumPy, for all rows of a batch at once: the arrays are small
enough that waiting for a second thread costs more than it saves. A generator per row gives one
number for each token that is drawn, so that a seed means the same on every device and whatever the
neighbours do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import TunesmithError
from core.inference.drawing import Cuts, draw_tokens
from core.inference.engine import SamplingParams
from core.inference.generation import TokenChoice
from core.inference.grammar import Matcher
from core.inference.log_probabilities import describe
from core.inference.ranking import Floats, in_blocks, take_rows
from core.inference.shaping import Shaping, shape_logits

# Dividing by less leaves nothing but the best token, and in float32 perhaps not even that.
_GREEDY_BELOW = 1e-6


class RowSampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: How to choose.
        row: Number of the answer; answer `row` of seed `s` is answer 0 of seed `s + row`.
        prompt_ids: The prompt, which counts for the repetition penalty.
        end_ids: Tokens that end the answer, ruled out before `min_new_tokens`.
        matcher: Says which tokens `response_format` allows; this answer's own.

    Attributes:
        sampling: How to choose.
        shaping: What changes the answer's logits.
        matcher: See above.
        is_greedy: Whether the best token is taken, not drawn.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        row: int,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling = sampling
        self.shaping = Shaping(sampling, prompt_ids, end_ids)
        self.matcher = matcher
        self.is_greedy = sampling.temperature < _GREEDY_BELOW
        self._end_ids = frozenset(end_ids)
        self._takes_the_best = (
            self.is_greedy
            and self.shaping.is_none
            and matcher is None
            and sampling.logprobs is None
        )
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed + row)

    def takes_the_best(self, token_id: int) -> bool:
        """Tell whether the token with the highest logit is the next one, and nothing else asked."""
        # What `min_new_tokens` rules out matters only where it is the best.
        return self._takes_the_best and (self.shaping.may_end or token_id not in self._end_ids)

    def accept(self, token_id: int) -> TokenChoice:
        """Note the token that was chosen.

        Raises:
            TunesmithError: Those of `Matcher.accept`.
        """
        self.shaping.accept(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        return TokenChoice(token_id)

    def uniform(self) -> float:
        """Return the number that the next token is drawn with, from 0 to less than 1."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose_tokens(
    logits: Tensor, samplers: Sequence[RowSampler]
) -> list[TokenChoice | TunesmithError]:
    """Choose the next token of every row; an error takes the place of its own row alone.

    The errors have the code `logits_not_finite`, or are those of `Matcher`.

    Args:
        logits: Shape (rows, vocabulary), left unchanged.
        samplers: One for each row.
    """
    raw: Floats = logits.to("cpu", torch.float32).numpy()
    # NaN counts as best.
    best = raw.argmax(axis=1)
    is_finite = np.isfinite(raw[np.arange(len(raw)), best]).tolist()
    chosen: dict[int, TokenChoice | TunesmithError] = {}
    others: list[int] = []
    allowed: dict[int, NDArray[np.bool_]] = {}
    for row, (sampler, token_id) in enumerate(zip(samplers, best.tolist(), strict=True)):
        try:
            if not is_finite[row]:
                chosen[row] = _not_finite()
            elif sampler.takes_the_best(token_id):
                chosen[row] = sampler.accept(token_id)
            else:
                if sampler.matcher is not None:
                    allowed[len(others)] = sampler.matcher.allowed(raw.shape[1])
                others.append(row)
        except TunesmithError as error:
            chosen[row] = error
    if others:
        found = _choose([samplers[row] for row in others], take_rows(raw, others), allowed)
        chosen.update(zip(others, found, strict=True))
    return [chosen[row] for row in range(len(samplers))]


def _choose(
    samplers: Sequence[RowSampler], raw: Floats, allowed: dict[int, NDArray[np.bool_]]
) -> list[TokenChoice | TunesmithError]:
    """Choose the tokens of rows that ask for more than the best one; see `choose_tokens`."""
    logits = in_blocks(raw)
    with np.errstate(over="ignore", invalid="ignore"):
        shape_logits(logits, [sampler.shaping for sampler in samplers], allowed)
    ids = logits.argmax(axis=1)
    is_finite = np.isfinite(logits[np.arange(len(logits)), ids])
    drawing = [
        row for row, sampler in enumerate(samplers) if is_finite[row] and not sampler.is_greedy
    ]
    if drawing:
        ids[drawing] = draw_tokens(
            take_rows(logits, drawing),
            Cuts.of([samplers[row].sampling for row in drawing], raw.shape[1]),
            np.array([samplers[row].uniform() for row in drawing]),
        )
    choices: list[TokenChoice | TunesmithError] = []
    for sampler, token_id, usable in zip(samplers, ids.tolist(), is_finite.tolist(), strict=True):
        try:
            choices.append(sampler.accept(token_id) if usable else _not_finite())
        except TunesmithError as error:
            choices.append(error)
    _add_logprobs(choices, samplers, raw)
    return choices


def _add_logprobs(
    choices: list[TokenChoice | TunesmithError], samplers: Sequence[RowSampler], raw: Floats
) -> None:
    """Complete the choices of those answers that report log-probabilities."""
    asked = [
        (row, choice, sampler.sampling.logprobs)
        for row, (choice, sampler) in enumerate(zip(choices, samplers, strict=True))
        if sampler.sampling.logprobs is not None and isinstance(choice, TokenChoice)
    ]
    if asked:
        described = describe(
            take_rows(raw, [row for row, _, _ in asked]),
            [choice.token_id for _, choice, _ in asked],
            [most for _, _, most in asked],
        )
        for (row, choice, _), (logprob, top) in zip(asked, described, strict=True):
            choices[row] = replace(choice, logprob=logprob, top=top)


def _not_finite() -> TunesmithError:
    return TunesmithError(
        "the model computed values that are not numbers", code="logits_not_finite"
    )
