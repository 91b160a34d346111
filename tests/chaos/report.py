"""The report of a chaos run, as Markdown: what was done, how long recovery took, what was wrong."""

from __future__ import annotations

import math
import os
import platform
from collections import defaultdict

from tests.chaos.driver import Outcome
from tests.chaos.schedule import INSTANTS, MATRIX


def to_markdown(outcome: Outcome) -> str:
    """Return the report."""
    total = sum(outcome.seconds.values())
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    jobs = ", ".join(f"{count} {status}" for status, count in sorted(outcome.jobs.items()))
    verdict = f"{len(outcome.violations)} violations" if outcome.violations else "no violation"
    lines = [
        f"**{len(outcome.done)} faults, {verdict}.** Seed {outcome.seed}; "
        f"{total / 60:.1f} min on {os.cpu_count()} cores, Python {platform.python_version()} "
        f"({phases}). Jobs: {jobs}. Requests sent again by clients: {outcome.retries}. "
        f"Jobs that failed for a full disk and were retried: {len(outcome.retried)}. "
        f"Full disk: {outcome.disk}.",
        "",
        "Faults done at each instant:",
        "",
        *_matrix(outcome),
        "",
        "Recovery, in seconds from the fault until the job that was hit was where it had been, and",
        "further (or had ended), and the part that was hit worked again:",
        "",
        *_recovery(outcome),
    ]
    if outcome.unreached:
        lines += ["", "Not done, since the instant did not come:", ""]
        lines += [f"- {injection}" for injection in outcome.unreached]
    if outcome.violations:
        lines += ["", "Violations:", ""]
        lines += [f"- {violation}" for violation in outcome.violations]
    return "\n".join(lines) + "\n"


def _matrix(outcome: Outcome) -> list[str]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for recovery in outcome.done:
        counts[recovery.injection.instant, recovery.injection.fault] += 1
    lines = [
        "| instant | " + " | ".join(MATRIX) + " |",
        "| --- |" + " ---: |" * len(MATRIX),
    ]
    for instant in INSTANTS:
        cells = [
            str(counts[instant, fault]) if instant in instants else ""
            for fault, instants in MATRIX.items()
        ]
        lines.append(f"| {instant} | " + " | ".join(cells) + " |")
    return lines


def _recovery(outcome: Outcome) -> list[str]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for recovery in outcome.done:
        seconds[recovery.injection.fault].append(recovery.seconds or 0.0)
    lines = ["| fault | times | median | 95 % | longest |", "| --- | ---: | ---: | ---: | ---: |"]
    for fault in MATRIX:
        if found := sorted(seconds[fault]):
            middle, high = found[len(found) // 2], found[math.ceil(0.95 * len(found)) - 1]
            lines.append(
                f"| {fault} | {len(found)} | {middle:.1f} | {high:.1f} | {found[-1]:.1f} |"
            )
    return lines
