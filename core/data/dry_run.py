"""The dry run: read, check, render and mask every row as training would, and count.

Needs the base model's tokenizer and config, not its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.data.check import invalid_dataset
from core.data.columns import parse_source
from core.data.detect import check_method, detect_format
from core.data.evidence import check_evidence
from core.data.figures import build_report
from core.data.pairs import PreferencePair, render_example
from core.data.rendered import RenderedDataset, RenderedRow, RenderedSource
from core.data.rendering import TrainingRow
from core.data.report import DryRunReport, DryRunWarning, Finding
from core.data.rows import ParsedRow, Problem
from core.data.schema import Example, check_row, to_example
from core.data.selection import RowSelector, prepare
from core.data.sources import DataSource
from core.data.trained_text import TrainedTextCheck
from core.errors import InvalidInput
from core.specs import DataSpec, JobSpec


def render_dataset(
    spec: JobSpec,
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    context_length: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> RenderedDataset:
    """Read and render all rows.

    Args:
        spec: The job.
        sources: Where the rows come from.
        tokenizer: From `load_tokenizer`, of the base model.
        context_length: Most tokens that the base model can read.
        check_stop: Called before each row; may raise to end early.

    Raises:
        InvalidInput: Code `invalid_dataset`, with all findings; or one that concerns a data set as
            a whole, such as `unknown_column`, `method_format_mismatch` or `too_few_rows`.
    """
    reader = _Reader(spec, sources, tokenizer, context_length, check_stop)
    for number in range(len(sources)):
        reader.read(number)
    data = reader.data
    if data.errors.count:
        raise invalid_dataset(data.errors.listed, data.errors.count)
    _check_rows_left(spec, data)
    return data


def dry_run(
    spec: JobSpec,
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    context_length: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> DryRunReport:
    """Return what training would do; takes and raises what `render_dataset` does."""
    data = render_dataset(
        spec, sources, tokenizer, context_length=context_length, check_stop=check_stop
    )
    return build_report(spec, data)


def examine(
    spec: JobSpec,
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    context_length: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> DryRunReport:
    """Return what `dry_run` does, with its errors in the report instead of raised."""
    reader = _Reader(spec, sources, tokenizer, context_length, check_stop)
    whole: list[Finding] = []
    for number, source in enumerate(sources):
        try:
            reader.read(number)
        except InvalidInput as error:
            whole.append(_finding(error, source.name or None))
    if not reader.data.errors.count and not whole:
        try:
            _check_rows_left(spec, reader.data)
        except InvalidInput as error:
            whole.append(_finding(error, None))
    return build_report(spec, reader.data, whole)


class _Reader:
    """Reads the sources of a job one after the other; `data` is what they came to."""

    def __init__(
        self,
        spec: JobSpec,
        sources: Sequence[DataSource],
        tokenizer: Any,
        context_length: int | None,
        check_stop: Callable[[], None],
    ) -> None:
        # The format that an upload was found in is that of its own columns.
        formats = [None if spec.data.columns else source.format for source in sources]
        self.data = RenderedDataset(
            min(spec.training.max_length, context_length or spec.training.max_length),
            [RenderedSource(*read) for read in zip(sources, formats, strict=True)],
        )
        self._spec = spec
        self._tokenizer = tokenizer
        self._check_stop = check_stop
        self._trained_text = TrainedTextCheck(tokenizer)
        # What a row says → position of the first that says it.
        self._known: dict[bytes, int] = {}

    def read(self, number: int) -> None:
        """Read one source.

        Raises:
            InvalidInput: It is unusable as a whole; findings in rows are in `data`.
        """
        read = self.data.sources[number]
        check_method(self._spec.method.type, read.format)
        selector = RowSelector(_selection(self._spec.data, read.source))
        read.dropped = selector.dropped
        for parsed in parse_source(read.source.path, self._spec.data.columns):
            self._check_stop()
            read.seen += 1
            if selector.slices_off():
                continue
            example = self._understand(parsed, read)
            if example is not None and not selector.filters_out(example):
                self._render(prepare(example, self._spec.data), parsed.line, number)
        self.data.notes = [
            DryRunWarning(code=code, message=message)
            for code, message in self._trained_text.notes()
        ]

    def _understand(self, parsed: ParsedRow, read: RenderedSource) -> Example | None:
        problems = [parsed.problem] if parsed.problem is not None else []
        if not problems:
            if read.format is None:
                read.format = detect_format(parsed.row, parsed.line)
                check_method(self._spec.method.type, read.format)
            problems = check_row(parsed.row, read.format)
        for problem in problems:
            self.data.errors.add(parsed.line, problem, read.source.name)
        return None if problems or read.format is None else to_example(parsed.row, read.format)

    def _render(self, example: Example, line: int, number: int) -> None:
        try:
            rendered = render_example(example, self._tokenizer)
            _check_tokens(self.data, rendered)
            self._trained_text.check(example, rendered)
        except InvalidInput as error:
            if error.code == "no_chat_template":
                raise
            problem = Problem(error.code, _sentence(error), error.field)
            self.data.errors.add(line, problem, self.data.sources[number].source.name)
            return
        at = len(self.data.rows)
        first = self._known.setdefault(_identity(example), at)
        self.data.rows.append(
            RenderedRow(line, example, rendered, None if first == at else first, number)
        )


def _selection(spec: DataSpec, source: DataSource) -> DataSpec:
    """Return what is selected of a source: the slice is of what is learnt, filters are for all."""
    if source.role == "training":
        return spec
    return spec.model_copy(update={"skip_rows": 0, "max_rows": None})


def _check_tokens(data: RenderedDataset, rendered: TrainingRow | PreferencePair) -> None:
    tokens = rendered.longest
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


def _check_rows_left(spec: JobSpec, data: RenderedDataset) -> None:
    learnt = sum(not data.validates(row) for row in data.rows)
    if not learnt:
        raise _no_rows(data.dropped)
    if spec.data.validation_fraction > 0 and learnt < 2:
        raise InvalidInput(
            "one row cannot be divided into training and validation rows",
            code="too_few_rows",
            field="data.validation_fraction",
            hint="Send more rows, or set the fraction to 0.",
        )
    if spec.data.validation_dataset is not None and learnt == len(data.rows):
        raise InvalidInput(
            "no row is left to validate on",
            code="no_validation_rows",
            field="data.validation_dataset",
            hint="Use a data set with rows that the filters of the spec keep.",
        )
    check_evidence(spec, len(data.divide(spec)[1]))


def _no_rows(dropped: Mapping[str, int]) -> InvalidInput:
    if not dropped:
        return InvalidInput("the data set has no rows", code="empty_dataset")
    reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(dropped.items()))
    return InvalidInput(
        f"no row is left to train on; left out by {reasons}",
        code="no_rows_left",
        field="data",
        hint="Loosen the filters or the slice of the spec.",
    )


def _finding(error: InvalidInput, dataset: str | None) -> Finding:
    return Finding(
        dataset=dataset,
        line=error.line,
        field=error.field,
        code=error.code,
        message=_sentence(error),
    )


def _sentence(error: InvalidInput) -> str:
    return f"{error.message}. {error.hint}" if error.hint else error.message


def _identity(example: Example) -> bytes:
    content = json.dumps(
        [_content(example), example.rejected and _content(example.rejected)],
        ensure_ascii=True,
        sort_keys=True,
    )
    return hashlib.blake2b(content.encode("ascii"), digest_size=16).digest()


def _content(example: Example) -> list[Any]:
    return [example.messages, example.prompt, example.completion, example.tools]
