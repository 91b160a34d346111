"""The before/after report in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from service.report_view import ComparisonTable, ReportView, Sample, view_report

_STYLES: Final = {"good": "green", "bad": "red", "wait": "yellow", "": ""}


def print_report(job: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Print a report.

    Args:
        job: As `GET /jobs/{id}` answers.
        report: As `GET /jobs/{id}/report` answers.
    """
    # Texts of models may look like markup or emoji codes; they are shown as they are.
    console = Console(markup=False, highlight=False, emoji=False)
    view = view_report(job, report)
    console.print(_heading(view))
    for table in view.tables:
        console.print(_table(table))
    if view.samples and view.sampling:
        console.print(Text(f"\n{view.sampling}", style="dim"))
    for number, sample in enumerate(view.samples, 1):
        console.print(_sample(number, sample))
    facts = Table.grid(padding=(0, 2))
    for name, value in view.facts:
        facts.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
    console.print(Padding(facts, (1, 0, 0, 0)))


def _heading(view: ReportView) -> Group:
    style = _STYLES[view.outcome.mood]
    return Group(
        Text(view.title, style="bold"),
        Text(view.subtitle, style="dim"),
        Text(f"\n{view.outcome.headline}", style=f"bold {style}".strip()),
        *(Text(line) for line in view.outcome.lines),
    )


def _table(comparison: ComparisonTable) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "base", "adapter", "change"):
        table.add_column(column, overflow="fold")
    for row in comparison.rows:
        change = Text(row.change, style=_STYLES[row.mood])
        table.add_row(Text(row.name), Text(row.base), Text(row.adapter), change)
    return Group(
        Text(f"\n{comparison.title}", style="bold"), table, Text(comparison.note, style="dim")
    )


def _sample(number: int, sample: Sample) -> Panel:
    parts = [
        text for turn in sample.before for text in (Text(turn.role, style="dim"), _inert(turn.text))
    ]
    parts += [Text("prompt", style="dim"), _inert(sample.prompt)]
    for answer in sample.answers:
        parts += [Text(f"\n{answer.name.lower()}", style="dim"), _inert(answer.text or "(no text)")]
    return Panel(Group(*parts), title=str(number), title_align="left", border_style="dim")


def _inert(text: str) -> Text:
    """Return a text whose control characters a terminal does not obey."""
    return Text("".join(c if c in "\n\t" or c.isprintable() else "�" for c in text))
