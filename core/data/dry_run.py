"""The dry run: read, check, render and mask every row as training would, and count.

Needs the base model's tokenizer and config, not its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data.check import ErrorList, invalid_dataset
from core.data.detect import DatasetFormat, detect_format
from core.data.figures import build_report
from core.data.ingest import parse_rows
from core.data.rendering import TrainingRow, render_row
from core.data.report import DryRunReport, Finding
from core.data.rows import Problem
from core.data.schema import Example, check_row, to_example
from core.data.selection import RowSelector, prepare
from core.errors import InvalidInput
from core.specs import DataSpec, JobSpec


@dataclass(frozen=True)
class RenderedRow:
    """A row of the data set as training uses it.

    Attributes:
        line: Where it stands in the file.
        same_as: Line of the first row that says the same; `None` when there is no earlier one.
    """

    line: int
    example: Example
    rendered: TrainingRow
    same_as: int | None = None


@dataclass
class RenderedDataset:
    """All rows of a data set, or what is wrong with them.

    Attributes:
        format: Format of the rows; `None` when no row could be read.
        limit_tokens: Most tokens a row may have.
        rows: The good rows, in file order.
        seen: Rows read, bad ones included.
        dropped: Why rows were left out on the spec's wish → how many.
        errors: The findings.
        too_long: Rows over the limit, which are among the findings.
        longest_tokens: Of these.
    """

    format: DatasetFormat | None
    limit_tokens: int
    rows: list[RenderedRow] = field(default_factory=list)
    seen: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    errors: ErrorList = field(default_factory=ErrorList)
    too_long: int = 0
    longest_tokens: int = 0

    @property
    def duplicates(self) -> int:
        """Rows that say the same as an earlier one."""
        return sum(row.same_as is not None for row in self.rows)


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
    data = RenderedDataset(format, max_length)
    _read(data, path, tokenizer, spec, check_stop)
    if data.errors.count:
        raise invalid_dataset(data.errors.listed, data.errors.count)
    _check_rows_left(data)
    return data


def dry_run(
    spec: JobSpec,
    data_path: Path,
    format: DatasetFormat | None,  # noqa: A002
    tokenizer: Any,
    *,
    context_length: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> DryRunReport:
    """Return what training on a data set would do.

    Args:
        spec: The job.
        data_path: An accepted file; see `core.data.ingest`.
        format: Format of the rows.
        tokenizer: From `load_tokenizer`, of the base model.
        context_length: Most tokens that the base model can read.
        check_stop: Called before each row; may raise to end early.

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
    return build_report(spec, data)


def examine(
    spec: JobSpec,
    data_path: Path,
    format: DatasetFormat | None,  # noqa: A002
    tokenizer: Any,
    *,
    context_length: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> DryRunReport:
    """Return what `dry_run` does, with its errors in the report instead of raised."""
    data = RenderedDataset(format, row_limit(spec, context_length))
    whole: list[Finding] = []
    try:
        _read(data, data_path, tokenizer, spec.data, check_stop)
        if not data.errors.count:
            _check_rows_left(data)
            check_row_count(spec, len(data.rows))
    except InvalidInput as error:
        whole.append(
            Finding(line=error.line, field=error.field, code=error.code, message=_sentence(error))
        )
    return build_report(spec, data, whole)


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


def _read(
    data: RenderedDataset,
    path: Path,
    tokenizer: Any,
    spec: DataSpec,
    check_stop: Callable[[], None],
) -> None:
    """Fill in rows and findings."""
    known: dict[bytes, int] = {}
    selector = RowSelector(spec)
    data.dropped = selector.dropped
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
            rendered = render_row(example, tokenizer)
            _check_tokens(data, rendered)
        except InvalidInput as error:
            if error.code == "no_chat_template":
                raise
            data.errors.add(parsed.line, Problem(error.code, _sentence(error), error.field))
            continue
        same_as = known.setdefault(_identity(example), parsed.line)
        data.rows.append(
            RenderedRow(parsed.line, example, rendered, None if same_as == parsed.line else same_as)
        )


def _check_tokens(data: RenderedDataset, rendered: TrainingRow) -> None:
    tokens = len(rendered.input_ids)
    if tokens > data.limit_tokens:
        data.too_long += 1
        data.longest_tokens = max(data.longest_tokens, tokens)
        raise InvalidInput(
            f"the row has {tokens:,} tokens and the limit is {data.limit_tokens:,}",
            code="row_too_long",
            hint="Shorten it, or raise training.max_length as far as the model's context allows.",
        )
    if not rendered.trained_tokens:
        raise InvalidInput("the row has no token to learn", code="no_trained_tokens")


def _check_rows_left(data: RenderedDataset) -> None:
    if not data.rows:
        raise _no_rows(data.dropped)


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
