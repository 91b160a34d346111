"""A base model in memory: its rows, its tokenizer, and the gates that its adapters pass.

Used from the engine thread only, except for what its docstrings say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from core.errors import TunesmithError
from core.inference.engine import SamplingParams
from core.inference.gates import AdapterWeights, BaseFacts, check_applied, check_effect
from core.inference.generation import TokenChoice
from core.inference.grammar import GrammarCompiler
from core.inference.preparation import deliberate
from core.inference.prompts import EncodedPrompt, PromptEncoder
from core.inference.rows import Prepared, Row, RowModel
from core.inference.sampling import RowSampler, choose_tokens
from core.logging import get_logger

if TYPE_CHECKING:
    from core.inference.work import Line

# Golden tokens that are read at most; more would only take time from running requests.
_MAX_GOLDEN_TOKENS = 4

log = get_logger(__name__)


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter that passed the gates on its files, and what the rows made of it."""

    weights: AdapterWeights
    prepared: Prepared

    @property
    def bytes(self) -> int:
        """What it takes in memory once it is resident."""
        return self.prepared.bytes


class _Golden(NamedTuple):
    """Some tokens, and the logits of the base model by itself after them, (vocabulary,)."""

    ids: list[int]
    logits: Tensor


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
        grammars = GrammarCompiler(tokenizer, eos_ids, vocabulary)
        self._encoders: dict[str | None, PromptEncoder] = {
            None: PromptEncoder(tokenizer, context_length, vocabulary, grammars)
        }
        # Of the newest adapter; most adapters have the same ones.
        self._golden: _Golden | None = None
        # Of adapters that have not computed anything yet.
        self._unproven: dict[str, _Golden] = {}
        self._refusals: dict[str, TunesmithError] = {}

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
        """Make an adapter resident, or leave no trace.

        What it computes is looked at when it is first used; see `extend` and `prove`.

        Raises:
            Conflict: Code `adapter_not_applied`.
        """
        weights = adapter.weights
        try:
            check_applied(self.rows.insert(weights.digest, adapter.prepared), weights.modules)
            self._unproven[weights.digest] = self._golden_for(weights)
        except BaseException:
            self.remove(weights.digest)
            raise
        # The tokenizer is the base's own, byte for byte; only the template is the adapter's.
        self._encoders[weights.digest] = self._encoders[None].with_template(weights.template)

    def extend(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row, in one pass; see `RowModel.extend`.

        Adapters that are used for the first time read their golden tokens in the same pass, where
        that leaves the rows' logits as they are. `refusal` tells what came of it.
        """
        used = dict.fromkeys(row.adapter for row in rows if row.adapter is not None)
        new = [digest for digest in used if digest in self._unproven]
        if not self.rows.rows_are_independent:
            while new:
                self._look_at(new.pop())
        if not new:
            return self.rows.extend(rows, pieces)
        probes = [self.rows.open_row(digest, self._unproven[digest].ids) for digest in new]
        try:
            logits = self.rows.extend(
                [*rows, *probes], [*pieces, *(probe.prompt_ids for probe in probes)]
            )
        finally:
            for probe in probes:
                self.rows.close_row(probe)
        for digest, own in zip(new, logits[len(rows) :], strict=True):
            self._judge(digest, own)
        return logits[: len(rows)]

    def prove(self, digest: str) -> None:
        """Look at what a resident adapter computes, unless it has computed before.

        Raises:
            TunesmithError: See `refusal`.
        """
        if digest in self._unproven:
            self._look_at(digest)
        if (refusal := self.refusal(digest)) is not None:
            raise refusal

    def refusal(self, digest: str | None) -> TunesmithError | None:
        """Return why nothing that a resident adapter computes may be used; `None` if it may.

        Most often that is a `Conflict`, code `adapter_not_finite` or `adapter_has_no_effect`.
        """
        return self._refusals.get(digest or "")

    def remove(self, digest: str) -> None:
        """Forget an adapter; a no-op for one that is not there."""
        self.rows.remove(digest)
        self._encoders.pop(digest, None)
        self._unproven.pop(digest, None)
        self._refusals.pop(digest, None)

    def _golden_for(self, weights: AdapterWeights) -> _Golden:
        ids = _telling(weights.golden_token_ids[:_MAX_GOLDEN_TOKENS])
        if self._golden is None or self._golden.ids != ids:
            self._golden = _Golden(ids, self.rows.logits_of(None, ids)[-1])
        return self._golden

    def _look_at(self, digest: str) -> None:
        self._judge(digest, self.rows.logits_of(digest, self._unproven[digest].ids)[-1])

    def _judge(self, digest: str, logits: Tensor) -> None:
        """Note whether the logits after its golden tokens, (vocabulary,), tell for an adapter."""
        golden = self._unproven.pop(digest)
        try:
            check_effect(golden.logits, logits)
        except Exception as error:
            # Rows of the same pass have taken their tokens: it must not seem to have failed.
            refusal = self._refusals[digest] = deliberate(error)
            log.warning("adapter_refused", digest=digest, code=refusal.code)


def _telling(ids: list[int]) -> list[int]:
    """Return as many of some tokens as an effect of any module takes to show.

    Attention to a single token, or to several of one kind, is the same whatever its queries and
    keys are; a token of a second kind makes the difference.
    """
    second = next((place for place, id_ in enumerate(ids) if id_ != ids[0]), len(ids) - 1)
    return ids[: second + 1]
