"""What commands make of their arguments and print, without a service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import InvalidInput, TunesmithError
from service.cli.follow import check_succeeded, describe_stage
from service.cli.job_validation import print_validation
from service.cli.jobs import assign
from service.cli.output import print_error, print_table, show_bytes, show_seconds
from tests.support.command_line import tunesmith

ROOT = Path(__file__).parents[2]


def test_help_loads_nothing_heavy() -> None:
    heavy = ["pydantic", "sqlalchemy", "fastapi", "httpx2", "celery", "rich", "torch"]
    probe = (
        "import sys, service.cli\n"
        "try:\n    service.cli.main(['--help'])\n"
        f"except SystemExit:\n    print([name for name in {heavy} if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "[]"


COMMANDS = [
    [],
    ["serve"], ["api"], ["engine"], ["worker"], ["doctor"], ["generate"],
    ["healthy", "api"], ["healthy", "engine"], ["healthy", "worker"],
    ["db", "upgrade"], ["db", "downgrade"], ["db", "current"], ["db", "check"],
    ["keys", "create"], ["keys", "list"], ["keys", "revoke"],
    ["models", "add"], ["models", "list"], ["models", "show"], ["models", "rm"],
    ["datasets", "upload"], ["datasets", "list"], ["datasets", "show"], ["datasets", "rm"],
    ["jobs", "submit"], ["jobs", "validate"], ["jobs", "list"], ["jobs", "show"],
    ["jobs", "events"], ["jobs", "metrics"], ["jobs", "report"], ["jobs", "cancel"], ["jobs", "rm"],
    ["adapters", "list"], ["adapters", "show"], ["adapters", "download"],
    ["adapters", "import"], ["adapters", "alias"], ["adapters", "rm"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    shown = tunesmith(*command, "--help")
    assert shown.code == 0
    assert shown.stdout.startswith(f"Usage: {' '.join(['tunesmith', *command])}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if len(c) == 2], ids=" ".join)
def test_every_command_can_print_json(command: list[str]) -> None:
    assert "--json" in tunesmith(*command, "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["jobs", "show"],
        ["worker", "--queue", "other"],
        ["jobs", "submit", "no-such-file.json"],
        ["generate"],
        ["generate", "one", "--messages", "-"],
        ["serve", "--port", "70000"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_why_on_stderr(arguments: list[str]) -> None:
    outcome = tunesmith(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "Error" in outcome.stderr


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("training.epochs=2", {"training": {"epochs": 2, "seed": 1}}),
        ("training.learning_rate=1e-4", {"training": {"seed": 1, "learning_rate": 1e-4}}),
        ("adapter=bot", {"training": {"seed": 1}, "adapter": "bot"}),
        ('lora.x=["q"]', {"training": {"seed": 1}, "lora": {"x": ["q"]}}),
        ("metadata.note=a=b", {"training": {"seed": 1}, "metadata": {"note": "a=b"}}),
    ],
)  # fmt: skip
def test_set_changes_one_field(assignment: str, expected: dict[str, Any]) -> None:
    spec: dict[str, Any] = {"training": {"seed": 1}}
    assign(spec, assignment)
    assert spec == expected


def test_a_data_set_takes_the_place_of_all_that_the_rows_came_from() -> None:
    spec: dict[str, Any] = {"dataset": "hf:a/b@main", "split": "train[:1%]", "rows": [{}]}
    assign(spec, "dataset=file-1")
    assert spec == {"dataset": "file-1"}
    assign(spec, "split=train")
    assert spec == {"dataset": "file-1", "split": "train"}


@pytest.mark.parametrize("assignment", ["epochs", "=1", "a..b=1", "training.seed.x=1"])
def test_set_refuses_what_is_no_assignment(assignment: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        assign({"training": {"seed": 1}}, assignment)
    assert caught.value.code == "invalid_assignment"


def test_an_error_shows_place_findings_and_hint(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(
        InvalidInput(
            "3 rows cannot be used",
            code="invalid_dataset",
            line=2,
            hint="Repair them.",
            errors=[{"line": number, "message": f"bad {number}"} for number in range(2, 15)],
        )
    )
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "error: line 2: 3 rows cannot be used (invalid_dataset)"
    assert lines[1] == "  - line 2: bad 2"
    assert lines[-2:] == ["  - and 3 more", "hint: Repair them."]


def test_a_table_in_a_file_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("id", "note"), [("job-1", "[x] " + "long " * 100)], empty="none")
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["id", "note"]
    assert row.split() == ["job-1", "[x]", *["long"] * 100]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (125, "2m 05s"), (7260, "2h 01m")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert show_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**50, "1024.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert show_bytes(count) == text


def job(status: str, **progress: Any) -> dict[str, Any]:
    return {"id": "job-1", "status": status, "progress": progress, "error": None}


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (job("queued", queue_position=2), "queued behind 2"),
        (job("queued", queue_position=0), "queued"),
        (job("running", stage="training"), "running: training"),
        (job("succeeded", stage="publishing"), "succeeded"),
    ],
)
def test_stages(shown: dict[str, Any], text: str) -> None:
    assert describe_stage(shown) == text


def test_a_job_that_did_not_succeed_is_an_error_with_its_reason() -> None:
    check_succeeded(job("succeeded"))
    with pytest.raises(TunesmithError, match="job-1 cancelled"):
        check_succeeded(job("cancelled"))
    failed = {**job("failed"), "error": {"code": "out_of_memory", "message": "no", "hint": "less"}}
    with pytest.raises(TunesmithError) as caught:
        check_succeeded(failed)
    assert (caught.value.code, caught.value.hint) == ("out_of_memory", "less")


def test_nobody_at_the_url_is_explained() -> None:
    outcome = tunesmith("jobs", "list", "--json", "--url", "ftp://somewhere")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "invalid_url" in outcome.stderr


def test_a_spec_that_is_no_json_is_refused(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    for text in ("{", json.dumps([1])):
        spec.write_text(text)
        outcome = tunesmith("jobs", "submit", spec)
        assert outcome.code == 1
        assert "invalid_json" in outcome.stderr


def test_several_data_sets_take_the_place_of_one() -> None:
    spec = {"dataset": "file-1", "split": "train", "data": {}}
    assign(spec, 'datasets=[{"dataset": "file-2", "weight": 0.5}]')
    assert spec == {"data": {}, "datasets": [{"dataset": "file-2", "weight": 0.5}]}


def test_the_report_of_several_data_sets_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    source = {
        "dataset": "file-a", "role": "training", "weight": 2.5, "format": "text", "rows_read": 7,
        "rows": 4, "rows_per_epoch": 10,
    }  # fmt: skip
    error = {
        "dataset": "file-b", "line": 3, "field": "text", "code": "empty", "message": "it is empty"
    }  # fmt: skip
    same = {
        "line": 4, "same_as_line": 5, "dataset": "file-b", "same_as_dataset": "file-a"
    }  # fmt: skip
    report = {
        "valid": False, "format": "text", "rows_read": 9, "rows": 6, "dropped": {},
        "sources": [source, source | {"dataset": "file-b", "role": "validation", "weight": 1.0}],
        "error_count": 1, "errors": [error], "too_long": None, "duplicates": 0,
        "duplicate_rows": [], "training_rows": 10, "validation_rows": 2, "overlap": 1,
        "overlap_rows": [same], "tokens": None, "trained_tokens": 0, "steps": 1,
        "tokens_per_epoch": 9, "total_tokens": 9, "histogram": [], "sample": None, "warnings": [],
    }  # fmt: skip
    print_validation({"report": report, "estimate": None})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "file-b 3 text empty it is empty" in lines
    assert "file-a training 2.5 text 7 4 10" in lines
    assert "file-b validation 1 text 7 4" in lines
    assert any("file-b:4 = file-a:5" in line for line in lines)
