"""The figures of a dry run: from the rendered rows to the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from core.data.rendering import Span, TrainingRow
from core.data.report import (
    Bucket,
    DryRunReport,
    DryRunWarning,
    Finding,
    SameRows,
    Sample,
    SourceFigures,
    TokenCounts,
    TooLong,
)
from core.data.split import count_steps
from core.specs import JobSpec

if TYPE_CHECKING:
    from core.data.rendered import RenderedDataset, RenderedRow

BUCKET_EDGES: Final = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""The least token count of each bucket of the histogram."""

MAX_LISTED_LINES: Final = 20
_MAX_SAMPLE_CHARACTERS = 4000
# Below these a warning is due; each is a rule of thumb.
_FEW_TRAINING_ROWS = 10
_LEAST_TRAINED_SHARE = 0.05
# So many rows before their lengths are compared, and which share of the tokens the longest tenth
# may have.
_ROWS_TO_COMPARE = 20
_MOST_TOKENS_OF_LONGEST = 0.5


def build_report(
    spec: JobSpec, data: RenderedDataset, whole: Sequence[Finding] = ()
) -> DryRunReport:
    """Return the report on a data set.

    Args:
        spec: The job.
        data: Its rows, or what is wrong with them.
        whole: Errors that concern the data set as a whole.
    """
    rows = data.rows
    training, validation = data.positions(spec)
    first_in_training: dict[int, RenderedRow] = {}
    for at in training:
        first_in_training.setdefault(_group(rows, at), rows[at])
    overlap = [
        _same(data, rows[at], first_in_training[_group(rows, at)])
        for at in validation
        if _group(rows, at) in first_in_training
    ]
    duplicates = [
        _same(data, row, rows[row.same_as])
        for row in rows
        # What a data set for validation has of the training rows is overlap.
        if row.same_as is not None and data.validates(row) == data.validates(rows[row.same_as])
    ]
    lengths = sorted(row.rendered.tokens for row in rows)
    trained = [row.rendered.trained_tokens for row in rows]
    steps = count_steps(len(training), spec.training) if training else 0
    per_epoch = sum(rows[at].rendered.tokens for at in training)
    findings = [
        *whole,
        *(Finding.model_validate(error.model_dump()) for error in data.errors.listed),
    ]
    return DryRunReport(
        valid=not findings,
        format=data.format,
        sources=_describe_sources(data, training) if len(data.sources) > 1 else [],
        rows_read=data.seen,
        rows=len(rows),
        dropped=data.dropped,
        error_count=len(whole) + data.errors.count,
        errors=findings,
        too_long=TooLong(
            rows=data.too_long,
            longest_tokens=data.longest_tokens,
            limit_tokens=data.limit_tokens,
        )
        if data.too_long
        else None,
        duplicates=len(duplicates),
        duplicate_rows=duplicates[:MAX_LISTED_LINES],
        training_rows=len(training),
        validation_rows=len(validation),
        overlap=len(overlap),
        overlap_rows=overlap[:MAX_LISTED_LINES],
        tokens=_count(lengths) if lengths else None,
        trained_tokens=sum(trained),
        histogram=_histogram(lengths, trained),
        steps=steps,
        tokens_per_epoch=per_epoch,
        total_tokens=_total_tokens(spec, len(training), steps, per_epoch),
        sample=_sample(data, rows[0]) if rows else None,
        warnings=[
            *data.notes,
            *_warnings(data, duplicates, overlap, lengths, trained, len(training)),
            *_setting_warnings(spec),
        ],
    )


def _setting_warnings(spec: JobSpec) -> list[DryRunWarning]:
    if not spec.training.packing:
        return []
    message = (
        "rows are not packed: no attention kernel in use keeps rows of one sequence apart; rows of "
        "similar length share a forward pass instead"
    )
    return [DryRunWarning(code="not_packed", message=message, lines=[])]


def _group(rows: Sequence[RenderedRow], at: int) -> int:
    """Return the first position of those that say the same."""
    first = rows[at].same_as
    return at if first is None else first


def _same(data: RenderedDataset, row: RenderedRow, first: RenderedRow) -> SameRows:
    return SameRows(
        line=row.line,
        same_as_line=first.line,
        dataset=data.name_of(row),
        same_as_dataset=data.name_of(first),
    )


def _describe_sources(data: RenderedDataset, training: Iterable[int]) -> list[SourceFigures]:
    kept = Counter(row.source for row in data.rows)
    used = Counter(data.rows[at].source for at in training)
    return [
        SourceFigures(
            dataset=read.source.name,
            role=read.source.role,
            weight=read.source.weight,
            format=read.format,
            rows_read=read.seen,
            rows=kept[number],
            rows_per_epoch=used[number],
        )
        for number, read in enumerate(data.sources)
    ]


def _total_tokens(spec: JobSpec, training_rows: int, steps: int, per_epoch: int) -> int:
    if not training_rows:
        return 0
    if spec.training.max_steps is None:
        return round(per_epoch * spec.training.epochs)
    rows_per_step = spec.training.batch_size * spec.training.gradient_accumulation_steps
    steps_per_epoch = math.ceil(training_rows / rows_per_step)
    return round(per_epoch * steps / steps_per_epoch)


def _count(ordered: list[int]) -> TokenCounts:
    return TokenCounts(
        total=sum(ordered),
        min=ordered[0],
        mean=round(sum(ordered) / len(ordered), 1),
        p50=_percentile(ordered, 0.50),
        p95=_percentile(ordered, 0.95),
        max=ordered[-1],
    )


def _percentile(ordered: list[int], share: float) -> int:
    """Return the nearest-rank percentile."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _histogram(lengths: Iterable[int], trained: Iterable[int]) -> list[Bucket]:
    """Return the buckets up to the last one with a row."""
    by_all, by_trained = _fill(lengths), _fill(trained)
    edges: list[int | None] = [*BUCKET_EDGES, None]
    buckets = [
        Bucket(from_tokens=low or 0, to_tokens=high, rows=rows, rows_by_trained=rows_by_trained)
        for (low, high), rows, rows_by_trained in zip(
            pairwise(edges), by_all, by_trained, strict=True
        )
    ]
    while buckets and not buckets[-1].rows:
        buckets.pop()
    return buckets


def _fill(counts: Iterable[int]) -> list[int]:
    filled = [0] * len(BUCKET_EDGES)
    for count in counts:
        filled[min(count.bit_length() - 4, len(BUCKET_EDGES) - 1) if count >= 16 else 0] += 1
    return filled


def _sample(data: RenderedDataset, row: RenderedRow) -> Sample:
    rendered = row.rendered
    text, spans = _shorten(rendered.text, rendered.spans)
    if isinstance(rendered, TrainingRow):
        return Sample(dataset=data.name_of(row), line=row.line, text=text, spans=spans)
    rejected_text, rejected_spans = _shorten(rendered.rejected_text, rendered.rejected_spans)
    return Sample(
        dataset=data.name_of(row),
        line=row.line,
        text=text,
        spans=spans,
        rejected_text=rejected_text,
        rejected_spans=rejected_spans,
    )


def _shorten(text: str, spans: Iterable[Span]) -> tuple[str, list[tuple[int, int]]]:
    text = text[:_MAX_SAMPLE_CHARACTERS]
    return text, [
        (span.start, min(span.end, len(text))) for span in spans if span.start < len(text)
    ]


def _warnings(
    data: RenderedDataset,
    duplicates: Sequence[SameRows],
    overlap: Sequence[SameRows],
    lengths: Sequence[int],
    trained: Sequence[int],
    training_rows: int,
) -> list[DryRunWarning]:
    found: list[DryRunWarning] = []

    def warn(code: str, message: str, rows: Sequence[SameRows] = ()) -> None:
        lines = [row.line for row in rows[:MAX_LISTED_LINES]]
        found.append(DryRunWarning(code=code, message=message, lines=lines))

    if duplicates:
        warn(
            "duplicate_rows",
            f"{len(duplicates):,} rows say exactly the same as an earlier one",
            duplicates,
        )
    if overlap:
        warn(
            "train_validation_overlap",
            f"{len(overlap):,} validation rows are in the training set as well, which makes the "
            "evaluation loss look better than it is",
            overlap,
        )
    if 0 < training_rows < _FEW_TRAINING_ROWS:
        warn("few_rows", f"{training_rows} rows to train on are few")
    filtered = sum(count for name, count in data.dropped.items() if "." in name)
    if filtered > len(data.rows):
        warn("most_rows_dropped", f"the filters leave out {filtered:,} rows, more than they keep")
    total = sum(lengths)
    if sum(trained) < _LEAST_TRAINED_SHARE * total:
        warn("little_to_learn", f"only {sum(trained) / total:.1%} of all tokens are learnt")
    longest = lengths[len(lengths) - len(lengths) // 10 :]
    if len(lengths) >= _ROWS_TO_COMPARE and sum(longest) > _MOST_TOKENS_OF_LONGEST * total:
        warn(
            "long_rows_dominate",
            f"the longest tenth of the rows has {sum(longest) / total:.0%} of all tokens",
        )
    return found
