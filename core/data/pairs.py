"""Turn preference pairs into tokens, by the same rules as the rows of `core.data.rendering`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.data.rendering import IGNORED_LABEL, Span, TrainingRow, render_row
from core.data.schema import Example


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and its two answers, ready for training.

    Attributes:
        prompt_ids: The ids that serving sends for this prompt.
        chosen_ids: What the model has to write for the answer that was chosen, to its end token.
        rejected_ids: The same for the answer that was rejected.
        text: Prompt and chosen answer as the model reads them.
        spans: The chosen answer in `text`.
        rejected_text: Prompt and rejected answer.
        rejected_spans: The rejected answer in `rejected_text`.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    text: str
    spans: list[Span]
    rejected_text: str
    rejected_spans: list[Span]

    @property
    def tokens(self) -> int:
        """Tokens that one pass over the pair reads; the prompt is read with each answer."""
        return 2 * len(self.prompt_ids) + self.trained_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def trained_tokens(self) -> int:
        """Number of positions that count in the loss."""
        return len(self.chosen_ids) + len(self.rejected_ids)


def render_example(example: Example, tokenizer: Any) -> TrainingRow | PreferencePair:
    """Render a row of any format.

    Raises:
        InvalidInput: See `core.data.rendering.render_row`.
    """
    if example.rejected is None:
        return render_row(example, tokenizer)
    chosen = render_row(example, tokenizer)
    rejected = render_row(example.rejected, tokenizer)
    prompt_ids, chosen_ids = _cut(chosen)
    _, rejected_ids = _cut(rejected)
    return PreferencePair(
        prompt_ids,
        chosen_ids,
        rejected_ids,
        chosen.text,
        chosen.spans,
        rejected.text,
        rejected.spans,
    )


def _cut(row: TrainingRow) -> tuple[list[int], list[int]]:
    """Divide a row before its one answer; what follows the end token is left out."""
    trained = [index for index, label in enumerate(row.labels) if label != IGNORED_LABEL]
    start, end = trained[0], trained[-1] + 1
    return row.input_ids[:start], row.input_ids[start:end]
