"""Which rows of a data set are used, and what a spec changes about each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from core.data.schema import Example
from core.specs import DataSpec, Role


class RowSelector:
    """Applies a spec's slice and length filters to rows, and counts what they leave out.

    Args:
        spec: The slice and the filters.

    Attributes:
        dropped: Why rows were left out → how many: `skip_rows`, `max_rows`, or a filter such as
            `max_chars.user`.
    """

    def __init__(self, spec: DataSpec) -> None:
        self._spec = spec
        self._seen = 0
        self.dropped: Counter[str] = Counter()

    def slices_off(self) -> bool:
        """Count one more row of the file and tell whether it lies outside the slice."""
        self._seen += 1
        if self._seen <= self._spec.skip_rows:
            self.dropped["skip_rows"] += 1
            return True
        most = self._spec.max_rows
        if most is not None and self._seen > self._spec.skip_rows + most:
            self.dropped["max_rows"] += 1
            return True
        return False

    def filters_out(self, example: Example) -> bool:
        """Tell whether a text of the row is too short or too long for its role."""
        reason = self._violated(example)
        if reason is not None:
            self.dropped[reason] += 1
        return reason is not None

    def _violated(self, example: Example) -> str | None:
        for role, text in _texts(example):
            if len(text) < self._spec.min_chars.get(role, 0):
                return f"min_chars.{role}"
            most = self._spec.max_chars.get(role)
            if most is not None and len(text) > most:
                return f"max_chars.{role}"
        return None


def prepare(example: Example, spec: DataSpec) -> Example:
    """Return a row as the spec wants it trained: its system turn, and what counts in the loss.

    Of a preference pair the two answers count; specs cannot ask for anything else.
    """
    if example.rejected is not None:
        example = replace(example, rejected=prepare(example.rejected, spec))
    if spec.system_prompt and example.messages and example.messages[0]["role"] != "system":
        trained = example.trained
        example = replace(
            example,
            messages=[{"role": "system", "content": spec.system_prompt}, *example.messages],
            trained=None if trained is None else tuple(index + 1 for index in trained),
        )
    if spec.train_on == "last" and example.messages is not None:
        return replace(example, trained=(len(example.messages) - 1,))
    return replace(example, whole=spec.train_on == "all")


def _texts(example: Example) -> list[tuple[Role, str]]:
    """Return the row's texts by role; of plain text, the prompt is the user's."""
    if example.rejected is not None:
        return [*_texts(replace(example, rejected=None)), *_texts(example.rejected)[-1:]]
    if example.messages is None:
        texts: list[tuple[Role, str]] = [("assistant", example.completion)]
        return [("user", example.prompt), *texts] if example.prompt else texts
    return [(turn["role"], turn["content"]) for turn in example.messages if turn["content"]]
