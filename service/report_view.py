"""A before/after report in words and rounded figures, for the page and the command line alike.

Reports are read as they were stored: members that an older version did not write are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mood = Literal["good", "bad", "wait", ""]
_LOWER_IS_BETTER, _HIGHER_IS_BETTER = -1, 1


@dataclass(frozen=True)
class Outcome:
    """What became of the version, and why."""

    mood: Mood
    headline: str
    lines: list[str]


@dataclass(frozen=True)
class Comparison:
    """One measure of base and adapter."""

    name: str
    base: str
    adapter: str
    change: str = ""
    mood: Mood = ""


@dataclass(frozen=True)
class ComparisonTable:
    """Measures that belong together."""

    title: str
    rows: list[Comparison]
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A text and whose it is."""

    name: str
    text: str


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt with the turns before it and the answers to it."""

    prompt: str
    before: list[Turn]
    answers: list[Text]


@dataclass(frozen=True)
class ReportView:
    """All that is shown."""

    title: str
    subtitle: str
    outcome: Outcome
    tables: list[ComparisonTable] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sampling: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)


def view_report(job: Mapping[str, Any], report: Mapping[str, Any]) -> ReportView:
    """Return what a reader sees.

    Args:
        job: As `GET /jobs/{id}` answers.
        report: As `GET /jobs/{id}/report` answers.
    """
    version = job["version"]
    title = f"{version['name']}@{version['version']}" if version else str(job["adapter"])
    return ReportView(
        title=title,
        subtitle=f"{job['base_model']} · {job['spec']['method']['type']} · {job['id']}",
        outcome=_outcome(job, report),
        tables=[
            table
            for table in (
                _losses(report),
                _preferences(report.get("preferences")),
                _scores(report.get("scores")),
                _forgetting(report.get("forgetting")),
            )
            if table is not None
        ],
        samples=[_sample(sample) for sample in report.get("samples") or []],
        sampling=_sampling(report.get("sampling")),
        facts=_facts(job, report),
    )


def _outcome(job: Mapping[str, Any], report: Mapping[str, Any]) -> Outcome:
    verdict = report.get("verdict") or {}
    reasons = [_sentence(reason) for reason in verdict.get("reasons") or []]
    policy, quarantine = (
        job["spec"].get("promote", "always"),
        (job["version"] or {}).get("quarantine"),
    )
    if quarantine:
        return Outcome("bad", "Quarantined: no alias points at it", reasons or [quarantine])
    better = verdict.get("better")
    if better is None:
        found = "Without validation rows nobody can say whether it is better."
    else:
        says = "says" if better else "does not say"
        found = f"The report {says} that it is better than the {verdict.get('compared_with')}."
    if policy == "manual":
        return Outcome("wait", "Published; nobody has promoted it automatically", [found, *reasons])
    if policy == "if_better" and better is not True:
        return Outcome("wait", "Published, and released by hand", [found, *reasons])
    mood: Mood = "bad" if better is False else "good"
    return Outcome(mood, "Published and promoted to latest", [found, *reasons])


def _losses(report: Mapping[str, Any]) -> ComparisonTable | None:
    found = report.get("evaluation")
    if not found:
        base, adapter = report.get("base_eval_loss"), report.get("eval_loss")
        if base is None or adapter is None:
            return None
        row = Comparison("Loss", _number(base), _number(adapter), _signed(adapter - base))
        return ComparisonTable("Validation rows", [row])
    interval = found["loss_change"]
    low, high = interval["low"], interval["high"]
    mood: Mood = "good" if high < 0 else "bad" if low > 0 else ""
    base, adapter = found["base"], found["adapter"]
    rows = [
        Comparison(
            "Loss per token",
            _number(base["loss"]),
            _number(adapter["loss"]),
            f"{_signed(interval['mean'])}  [{_signed(low)}, {_signed(high)}]",
            mood,
        ),
        Comparison("Perplexity", _number(base["perplexity"]), _number(adapter["perplexity"])),
    ]
    note = (
        f"{found['rows']:,} rows with {found['tokens']:,} trained tokens. In brackets the"
        f" {found['confidence']:.0%} bootstrap interval over rows; below zero is better."
    )
    return ComparisonTable("Validation rows", rows, note)


def _preferences(found: Mapping[str, Any] | None) -> ComparisonTable | None:
    if not found:
        return None
    rows = []
    for name, form, neutral in (("accuracy", "{:.1%}", 0.5), ("margin", "{:+.3f}", 0.0)):
        values = {member: found[name][member] for member in ("mean", "low", "high")}
        mood: Mood = "good" if values["low"] > neutral else ""
        shown = {member: form.format(value) for member, value in values.items()}
        interval = f"[{shown['low']}, {shown['high']}]"
        rows.append(Comparison(name.capitalize(), "–", shown["mean"], interval, mood))
    note = (
        f"{found['pairs']:,} pairs, judged against the reference. In brackets the"
        f" {found['confidence']:.0%} bootstrap interval over pairs."
    )
    return ComparisonTable("Preferences", rows, note)


def _scores(found: Mapping[str, Any] | None) -> ComparisonTable | None:
    if not found:
        return None
    rows = [
        _compare(label, found["base"][name], found["adapter"][name], _HIGHER_IS_BETTER)
        for label, name in (("Exact match", "exact_match"), ("ROUGE-L", "rouge_l"))
    ]
    count = found["answers"]
    answers = f"{count} answer{'' if count == 1 else 's'}"
    return ComparisonTable(
        "Answers against their references",
        rows,
        f"From {answers} below: no more than an impression.",
    )


def _forgetting(found: Mapping[str, Any] | None) -> ComparisonTable | None:
    if not found:
        return None
    rows = [
        _compare("Loss per token", found["base"]["loss"], found["adapter"]["loss"], 0),
        _compare("Perplexity", found["base"]["perplexity"], found["adapter"]["perplexity"], 0),
    ]
    note = f"{found['tokens']:,} tokens of a fixed text. A rise says that something was forgotten."
    return ComparisonTable("General text", rows, note)


def _compare(name: str, base: float | None, adapter: float | None, better: int) -> Comparison:
    if base is None or adapter is None:
        return Comparison(name, _number(base), _number(adapter))
    change = adapter - base
    mood: Mood = "" if not better or not change else "good" if change * better > 0 else "bad"
    return Comparison(name, _number(base), _number(adapter), _signed(change), mood)


def _sample(sample: Mapping[str, Any]) -> Sample:
    earlier = (sample.get("messages") or [])[:-1]
    names = (("Base", "base"), ("Adapter", "adapter"), ("Reference", "reference"))
    return Sample(
        prompt=sample.get("prompt") or "",
        before=[Turn(str(turn.get("role", "")), _content(turn)) for turn in earlier],
        answers=[
            Text(label, sample.get(name) or "")
            for label, name in names
            if name != "reference" or sample.get(name)
        ],
    )


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, str) and content:
        return content
    return json.dumps(turn.get("tool_calls") or content, ensure_ascii=False)


def _sampling(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    drawn = (
        f"Drawn with temperature {found['temperature']:g}, top_p {found['top_p']:g} and seed"
        f" {found['seed']}"
        if found["temperature"]
        else "The most probable token each time"
    )
    penalty = found["repetition_penalty"]
    repeated = f", repetition penalty {penalty:g}" if penalty != 1 else ""
    return f"{drawn}{repeated}; at most {found['max_new_tokens']} new tokens."


def _facts(job: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    trainable, total = report.get("trainable_parameters"), report.get("total_parameters")
    parameters = None
    if trainable and total:
        parameters = f"{trainable:,} of {total:,} ({trainable / total:.2%})"
    facts = {
        "Adapter digest": (job["version"] or {}).get("digest"),
        "Promotion": job["spec"].get("promote"),
        "Training rows": _count(report.get("training_rows")),
        "Validation rows": _count(report.get("validation_rows")),
        "Last training loss": _number(report.get("train_loss")),
        "Trained parameters": parameters,
    }
    return [(name, value) for name, value in facts.items() if value]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
        if abs(value) < 1e9
        else f"{value:.3g}"
    )


def _signed(value: float) -> str:
    return f"+{_number(value)}" if value > 0 else _number(value).replace("-", "−")
