"""The rows of a job as training uses them, and what was read to get them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from core.data.check import ErrorList
from core.data.detect import DatasetFormat
from core.data.pairs import PreferencePair
from core.data.rendering import TrainingRow
from core.data.report import DryRunWarning
from core.data.schema import Example
from core.data.sources import DataSource
from core.data.split import repeat_rows, split_rows
from core.specs import JobSpec


@dataclass(frozen=True)
class RenderedRow:
    """A row as training uses it.

    Attributes:
        line: Where it stands in its file.
        same_as: Position of the first row that says the same; `None` when there is no earlier one.
        source: Position of its source.
    """

    line: int
    example: Example
    rendered: TrainingRow | PreferencePair
    same_as: int | None = None
    source: int = 0


@dataclass
class RenderedSource:
    """What was read of one source.

    Attributes:
        source: Where from.
        format: Format of its rows; `None` when no row could be read.
        seen: Rows read, bad ones included.
        dropped: Why rows were left out on the spec's wish → how many.
    """

    source: DataSource
    format: DatasetFormat | None
    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class RenderedDataset:
    """All rows of a job, or what is wrong with them.

    Attributes:
        limit_tokens: Most tokens a row may have.
        sources: Where they come from, those that validate last.
        rows: The good rows, by source and in file order.
        errors: The findings.
        too_long: Rows over the limit, which are among the findings.
        longest_tokens: Of these.
        notes: What the chat template does that a user should know.
    """

    limit_tokens: int
    sources: list[RenderedSource]
    rows: list[RenderedRow] = field(default_factory=list)
    errors: ErrorList = field(default_factory=ErrorList)
    too_long: int = 0
    longest_tokens: int = 0
    notes: list[DryRunWarning] = field(default_factory=list)

    @property
    def format(self) -> DatasetFormat | None:
        """Format of the first source."""
        return self.sources[0].format

    @property
    def seen(self) -> int:
        """Rows read, bad ones included."""
        return sum(source.seen for source in self.sources)

    @property
    def dropped(self) -> Counter[str]:
        """Why rows were left out on the spec's wish → how many."""
        dropped: Counter[str] = Counter()
        for source in self.sources:
            dropped.update(source.dropped)
        return dropped

    def validates(self, row: RenderedRow) -> bool:
        """Tell whether a row comes from a source of validation rows."""
        return self.sources[row.source].source.role == "validation"

    def name_of(self, row: RenderedRow) -> str | None:
        """Return what findings call the row's source; `None` when there is only one."""
        return self.sources[row.source].source.name or None

    def divide(self, spec: JobSpec) -> tuple[list[RenderedRow], list[RenderedRow]]:
        """Return the rows that one epoch learns from, and those that validate.

        The former has a row as often as the weight of its source says.
        """
        training, validation = self.positions(spec)
        return [self.rows[at] for at in training], [self.rows[at] for at in validation]

    def positions(self, spec: JobSpec) -> tuple[list[int], list[int]]:
        """Return what `divide` does, as positions in `rows`."""
        learnt = [at for at, row in enumerate(self.rows) if not self.validates(row)]
        apart = [at for at, row in enumerate(self.rows) if self.validates(row)]
        seed = spec.training.seed
        training, validation = split_rows(len(learnt), spec.data, seed)
        by_source: list[list[int]] = [[] for _ in self.sources]
        for index in training:
            by_source[self.rows[learnt[index]].source].append(learnt[index])
        weighted = [
            at
            for number, rows in enumerate(by_source)
            for at in repeat_rows(rows, self.sources[number].source.weight, f"{number}-{seed}")
        ]
        return weighted, [learnt[index] for index in validation] + apart
