"""What a dry run tells: findings by line, and figures of the rows without fault.

`core.data.figures` makes the report. Knows no model library, so that the API can describe it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Finding(_Part):
    """One error; `line` is 1-based, in the file or in the list of inline rows."""

    dataset: str | None = Field(None, description="Which one, of a job with several.")
    line: int | None = Field(description="`null` when it concerns the whole data set.")
    field: str | None = None
    code: str
    message: str


class SameRows(_Part):
    """A row and the one that says exactly the same."""

    line: int
    same_as_line: int
    dataset: str | None = Field(None, description="Which one, of a job with several.")
    same_as_dataset: str | None = None


class SourceFigures(_Part):
    """One data set of a job with several."""

    dataset: str
    role: Literal["training", "validation"]
    weight: float
    format: str | None
    rows_read: int
    rows: int = Field(description="That are left of it.")
    rows_per_epoch: int = Field(description="By its weight, without those that validate.")


class TooLong(_Part):
    """Rows with more tokens than the limit, each of which is among the errors."""

    rows: int
    longest_tokens: int
    limit_tokens: int = Field(description="Of `training.max_length` and of the model's context.")


class TokenCounts(_Part):
    """Tokens per row."""

    total: int
    min: int
    mean: float
    p50: int
    p95: int
    max: int


class Bucket(_Part):
    """Rows with `from_tokens` up to below `to_tokens`."""

    from_tokens: int
    to_tokens: int | None = Field(description="`null` in the last bucket.")
    rows: int = Field(description="By all tokens of a row.")
    rows_by_trained: int = Field(description="By the tokens of a row that are learnt.")


class Sample(_Part):
    """The first row as the model reads it, and which parts of it are learnt."""

    dataset: str | None = Field(None, description="Which one, of a job with several.")
    line: int
    text: str
    spans: list[tuple[int, int]] = Field(description="Start and end of learnt characters.")
    rejected_text: str | None = Field(
        None, description="Of a preference pair: the prompt and the answer that was rejected."
    )
    rejected_spans: list[tuple[int, int]] = []


class DryRunWarning(_Part):
    """Something to look at that does not stop a job."""

    code: str = Field(
        description="`duplicate_rows`, `train_validation_overlap`, `few_rows`, `most_rows_dropped`,"
        " `little_to_learn` or `long_rows_dominate`; of the template `chatml_fallback`,"
        " `template_dated` or `template_adds_text`."
    )
    message: str
    lines: list[int] = Field([], description="The first lines concerned, at most 20.")


class DryRunReport(_Part):
    """What training on a data set would do; all figures are of the rows without error.

    Attributes:
        valid: Whether a job would go on to training.
        sources: Of a job with several data sets or one of its own for validation.
        rows_read: All rows of the data sets.
        rows: Rows that are left to train and validate on.
        dropped: Why the spec leaves rows out → how many.
        error_count: All errors; `errors` has the first 100.
        duplicates: Rows that say exactly the same as an earlier one; `duplicate_rows` has the
            first 20.
        training_rows: That one epoch learns from, each as often as its data set's weight says.
        overlap: Validation rows that training has as well; `overlap_rows` has the first 20.
        trained_tokens: Tokens of all rows that count in the loss.
        tokens_per_epoch: Tokens of the training rows.
        total_tokens: That the whole training reads.
    """

    valid: bool
    format: str | None
    sources: list[SourceFigures] = []
    rows_read: int
    rows: int
    dropped: dict[str, int]
    error_count: int
    errors: list[Finding]
    too_long: TooLong | None
    duplicates: int
    duplicate_rows: list[SameRows]
    training_rows: int
    validation_rows: int
    overlap: int
    overlap_rows: list[SameRows]
    tokens: TokenCounts | None
    trained_tokens: int
    histogram: list[Bucket]
    steps: int
    tokens_per_epoch: int
    total_tokens: int
    sample: Sample | None
    warnings: list[DryRunWarning]
