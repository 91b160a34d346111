"""A base model in memory: its rows, its tokenizer, and the gates that its adapters pass.

Used from the engine thread only, except for what its docstrings say otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.errors import TunesmithError
from core.inference.engine import SamplingParams
from core.inference.gates import AdapterWeights, BaseFacts, check_applied, check_effect
from core.inference.generation import TokenChoice
from core.inference.grammar import GrammarCompiler
from core.inference.prompts import EncodedPrompt, PromptEncoder, longest_token
from core.inference.rows import Prepared, RowModel
from core.inference.sampling import RowSampler, choose_tokens

if TYPE_CHECKING:
    from core.inference.work import Line

# Enough positions to see an effect; more would only take time from running requests.
_MAX_GOLDEN_TOKENS = 4


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter that passed the gates on its files, and what the rows made of it."""

    weights: AdapterWeights
    prepared: Prepared

    @property
    def bytes(self) -> int:
        """What it takes in memory once it is resident."""
        return self.prepared.bytes


class LoadedBase:
    """One base model with its adapters.

    Args:
        rows: Computes.
        tokenizer: Its tokenizer.
        facts: What adapters are matched against.
        eos_ids: Tokens that end an answer.
        context_length: Tokens that prompt and answer may have together.
        vocabulary: Tokens that the model knows.
    """

    def __init__(
        self,
        rows: RowModel,
        tokenizer: Any,
        facts: BaseFacts,
        eos_ids: frozenset[int],
        context_length: int,
        vocabulary: int,
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.facts = facts
        self.eos_ids = eos_ids
        self._context_length = context_length
        self._vocabulary = vocabulary
        self._grammars = GrammarCompiler(tokenizer, eos_ids, vocabulary)
        self._longest_token = longest_token(tokenizer)
        self._encoders: dict[str | None, PromptEncoder] = {None: self._make_encoder(tokenizer)}
        self._golden: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def bytes(self) -> int:
        """What the base weights take."""
        return self.rows.weight_bytes

    @property
    def precision(self) -> str:
        """How the weights are kept, such as `float32`."""
        return self.rows.precision

    def encoder(self, adapter: str | None) -> PromptEncoder:
        """Return the prompt encoder of a resident adapter, or of the base model itself."""
        return self._encoders[adapter]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens left out; safe from any thread."""
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def token_text(self, token_id: int) -> str:
        """Return one token's own text; safe from any thread."""
        return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def end_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Return the tokens that end a request's answers."""
        return self.eos_ids.union(sampling.stop_token_ids)

    def sampler(self, sampling: SamplingParams, answer: int, prompt: EncodedPrompt) -> RowSampler:
        """Return what chooses the tokens of one answer."""
        matcher = prompt.matchers[answer] if prompt.matchers else None
        return RowSampler(sampling, answer, prompt.ids, self.end_ids(sampling), matcher)

    def choose(
        self, logits: Tensor, places: Sequence[int], lines: Sequence[Line]
    ) -> list[TokenChoice | TunesmithError]:
        """Choose the next tokens of several answers.

        An answer for which that fails has its error in the place of the token.

        Args:
            logits: Shape (chunks, vocabulary).
            places: For each answer the row of its logits.
            lines: The answers.
        """
        if list(places) != list(range(len(logits))):
            logits = logits[list(places)]
        return choose_tokens(logits, [line.sampler for line in lines])

    def prepare(self, weights: AdapterWeights) -> PreparedAdapter:
        """Do what an adapter needs before it is inserted; safe from any thread."""
        return PreparedAdapter(weights, self.rows.prepare(weights))

    def insert(self, adapter: PreparedAdapter) -> None:
        """Make an adapter resident, through the gates that need the model; or leave no trace.

        Raises:
            Conflict: Code `adapter_not_applied`, `adapter_not_finite` or `adapter_has_no_effect`.
        """
        weights = adapter.weights
        try:
            check_applied(self.rows.insert(weights.digest, adapter.prepared), weights.modules)
            self._check_effect(weights)
        except BaseException:
            self.remove(weights.digest)
            raise
        # The tokenizer is the base's own, byte for byte; only the template is the adapter's.
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = weights.template
        self._encoders[weights.digest] = self._make_encoder(tokenizer)

    def remove(self, digest: str) -> None:
        """Forget an adapter; a no-op for one that is not there."""
        self.rows.remove(digest)
        self._encoders.pop(digest, None)

    def _make_encoder(self, tokenizer: Any) -> PromptEncoder:
        return PromptEncoder(
            tokenizer,
            self._context_length,
            self._vocabulary,
            self._grammars,
            self._longest_token,
        )

    def _check_effect(self, weights: AdapterWeights) -> None:
        ids = tuple(weights.golden_token_ids[:_MAX_GOLDEN_TOKENS])
        if self._golden is None or self._golden[0] != ids:
            self._golden = (ids, self.rows.logits_of(None, ids))
        check_effect(self._golden[1], self.rows.logits_of(weights.digest, ids))
