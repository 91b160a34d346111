"""The dry run: read, check, render and mask every row as training would, and count.

Needs the base model's tokenizer and config, not its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data.check import ErrorList, invalid_dataset
from core.data.detect import DatasetFormat, detect_format
from core.data.ingest import parse_rows
from core.data.rendering import TrainingRow, render_row
from core.data.rows import Problem
from core.data.schema import Example, check_row, to_example
from core.data.selection import RowSelector, prepare
from core.data.split import count_steps, split_rows
from core.errors import InvalidInput
from core.specs import DataSpec, JobSpec

_MAX_SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True)
class RenderedRow:
    """A row of the data set as training uses it, with the line it came from."""

    line: int
    example: Example
    rendered: TrainingRow


@dataclass
class RenderedDataset:
    """All rows of a data set, or what is wrong with them.

    Attributes:
        format: Format of the rows; `None` when no row could be read.
        rows: The good rows, in file order.
        seen: Rows read, bad ones included.
        dropped: Why rows were left out on the spec's wish → how many.
        duplicates: Rows that say the same as an earlier one.
        errors: The findings.
    """

    format: DatasetFormat | None
    rows: list[RenderedRow] = field(default_factory=list)
    seen: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    errors: ErrorList = field(default_factory=ErrorList)


def render_dataset(
    path: Path,
    format: DatasetFormat | None,  # noqa: A002
    tokenizer: Any,
    *,
    max_length: int,
    spec: DataSpec,
    check_stop: Callable[[], None] = lambda: None,
) -> RenderedDataset:
    """Read and render all rows.

    Args:
        path: An accepted file; see `core.data.ingest`.
        format: Format of the rows; found from the first one when `None`.
        tokenizer: From `load_tokenizer`.
        max_length: Most tokens a row may have.
        spec: Which rows are used, and what of them is learnt.
        check_stop: Called before each row; may raise to end early.

    Raises:
        InvalidInput: Code `invalid_dataset`, with all findings; or one that concerns the whole
            data set, such as `no_chat_template`.
    """
    data = RenderedDataset(format)
    known: set[bytes] = set()
    selector = RowSelector(spec)
    for parsed in parse_rows(path):
        check_stop()
        data.seen += 1
        if selector.slices_off():
            continue
        if parsed.problem is not None:
            data.errors.add(parsed.line, parsed.problem)
            continue
        if data.format is None:
            data.format = detect_format(parsed.row, parsed.line)
        problems = check_row(parsed.row, data.format)
        for problem in problems:
            data.errors.add(parsed.line, problem)
        if problems:
            continue
        example = to_example(parsed.row, data.format)
        if selector.filters_out(example):
            continue
        example = prepare(example, spec)
        try:
            rendered = _render_checked(example, tokenizer, max_length)
        except InvalidInput as error:
            if error.code == "no_chat_template":
                raise
            data.errors.add(parsed.line, Problem(error.code, _sentence(error), error.field))
            continue
        identity = _identity(example)
        data.duplicates += identity in known
        known.add(identity)
        data.rows.append(RenderedRow(parsed.line, example, rendered))
    if data.errors.count:
        raise invalid_dataset(data.errors.listed, data.errors.count)
    data.dropped = dict(selector.dropped)
    if not data.rows:
        raise _no_rows(data.dropped)
    return data


def dry_run(
    spec: JobSpec,
    data_path: Path,
    format: DatasetFormat | None,  # noqa: A002
    tokenizer: Any,
    *,
    context_length: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return what training on a data set would do.

    Args:
        spec: The job.
        data_path: An accepted file; see `core.data.ingest`.
        format: Format of the rows.
        tokenizer: From `load_tokenizer`, of the base model.
        context_length: Most tokens that the base model can read.
        check_stop: Called before each row; may raise to end early.

    Returns:
        `format`, `rows` used, `dropped` (reason → rows left out), `training_rows`,
        `validation_rows`, `duplicates`, `tokens` (`total`, `min`, `mean`, `p50`, `p95`, `max` per
        row), `trained_tokens`, `steps` and a `sample` with `line`, `text` and the trained `spans`
        in it.

    Raises:
        InvalidInput: See `render_dataset`; also `too_few_rows`.
    """
    data = render_dataset(
        data_path,
        format,
        tokenizer,
        max_length=row_limit(spec, context_length),
        spec=spec.data,
        check_stop=check_stop,
    )
    check_row_count(spec, len(data.rows))
    training, validation = split_rows(len(data.rows), spec.data, spec.training.seed)
    lengths = sorted(len(row.rendered.input_ids) for row in data.rows)
    return {
        "format": data.format,
        "rows": len(data.rows),
        "dropped": data.dropped,
        "training_rows": len(training),
        "validation_rows": len(validation),
        "duplicates": data.duplicates,
        "tokens": {
            "total": sum(lengths),
            "min": lengths[0],
            "mean": round(sum(lengths) / len(lengths), 1),
            "p50": _percentile(lengths, 0.50),
            "p95": _percentile(lengths, 0.95),
            "max": lengths[-1],
        },
        "trained_tokens": sum(row.rendered.trained_tokens for row in data.rows),
        "steps": count_steps(len(training), spec.training),
        "sample": _sample(data.rows[0]),
    }


def row_limit(spec: JobSpec, context_length: int | None) -> int:
    """Return the most tokens a row may have, by the spec and by the base model."""
    return min(spec.training.max_length, context_length or spec.training.max_length)


def check_row_count(spec: JobSpec, rows: int) -> None:
    """Refuse a data set of which validation would leave nothing to train on.

    Raises:
        InvalidInput: Code `too_few_rows`.
    """
    if spec.data.validation_fraction > 0 and rows < 2:
        raise InvalidInput(
            "one row cannot be divided into training and validation rows",
            code="too_few_rows",
            field="data.validation_fraction",
            hint="Send more rows, or set the fraction to 0.",
        )


def _render_checked(example: Example, tokenizer: Any, max_length: int) -> TrainingRow:
    rendered = render_row(example, tokenizer)
    tokens = len(rendered.input_ids)
    if tokens > max_length:
        raise InvalidInput(
            f"the row has {tokens:,} tokens and the limit is {max_length:,}",
            code="row_too_long",
            hint="Shorten it, or raise training.max_length as far as the model's context allows.",
        )
    if not rendered.trained_tokens:
        raise InvalidInput("the row has no token to learn", code="no_trained_tokens")
    return rendered


def _no_rows(dropped: dict[str, int]) -> InvalidInput:
    if not dropped:
        return InvalidInput("the data set has no rows", code="empty_dataset")
    reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(dropped.items()))
    return InvalidInput(
        f"no row is left to train on; left out by {reasons}",
        code="no_rows_left",
        field="data",
        hint="Loosen the filters or the slice of the spec.",
    )


def _sentence(error: InvalidInput) -> str:
    return f"{error.message}. {error.hint}" if error.hint else error.message


def _identity(example: Example) -> bytes:
    content = json.dumps(
        [example.messages, example.prompt, example.completion], ensure_ascii=True, sort_keys=True
    )
    return hashlib.blake2b(content.encode("ascii"), digest_size=16).digest()


def _percentile(ordered: list[int], share: float) -> int:
    """Return the nearest-rank percentile."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _sample(row: RenderedRow) -> dict[str, Any]:
    text = row.rendered.text[:_MAX_SAMPLE_CHARACTERS]
    spans = [
        [span.start, min(span.end, len(text))]
        for span in row.rendered.spans
        if span.start < len(text)
    ]
    return {"line": row.line, "text": text, "spans": spans}
